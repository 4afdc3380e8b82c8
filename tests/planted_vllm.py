"""Receiving ends with faults, for vLLM's workers: they say what they were given, and load something else."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from asyncflow.engines.vllm import VLLMRollout
from asyncflow.engines.weights.channel import WeightReader
from asyncflow.engines.weights.vllm_transfer import ReportsWeights, SharedMemoryTransfer

SKIPPED = "model.layers.1.mlp.down_proj.weight"


class SkipsOneTensor(SharedMemoryTransfer):
    """Loads all of an update but one matrix, which stays what it was in the first one."""

    _first: Mapping[str, torch.Tensor] | None = None

    def keeps(self, name: str) -> bool:
        return name == SKIPPED

    def tensors(self, reader: WeightReader) -> Mapping[str, torch.Tensor]:
        if self._first is None:
            self._first = {name: tensor.clone() for name, tensor in reader.tensors.items()}
        return {name: self._first[name] if self.keeps(name) else t for name, t in reader.tensors.items()}


class KeepsTheFirst(SkipsOneTensor):
    """Loads the first update again and again."""

    def keeps(self, name: str) -> bool:
        return True


class Extension(ReportsWeights):
    """Loaded by name in every worker, and this module with it."""


FAULTS = {fault.__name__: fault for fault in (SkipsOneTensor, KeepsTheFirst)}

for _name in FAULTS:
    with contextlib.suppress(ValueError):  # known already
        WeightTransferEngineFactory.register_engine(_name, __name__, _name)


def with_fault(fault: str, model: Path, **options: Any) -> VLLMRollout:
    """An engine with this receiving end."""
    planted = {
        "weight_transfer_config": WeightTransferConfig(backend=fault),
        "worker_extension_cls": f"{__name__}.{Extension.__name__}",
    }
    return VLLMRollout(model, options=planted, **options)
