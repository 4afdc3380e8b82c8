"""The receiving end of the weight channel inside vLLM's workers: map the file, check it, load it.

Loaded by name (`vllm_plugin.BACKEND`) in every worker of an engine that is configured with it, see
https://docs.vllm.ai/en/latest/training/weight_transfer/ and …/layerwise/ for what vLLM expects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from asyncflow.engines.weights.channel import WeightReader
from asyncflow.errors import WeightsError


@dataclass
class NoInit(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not typed
    """There is nothing to agree on before the first update."""


@dataclass
class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One version, sent by the engine's owner."""

    path: str
    """Its file in the weight channel."""
    digest: str
    """What it must be."""
    repair_tied_head: bool = True
    """False leaves the LM head of a model with tied embeddings as vLLM leaves it: wrong (see `repack_heads`). Only the
    test that proves the repair to be needed sets it."""


class SharedMemoryTransfer(WeightTransferEngine[NoInit, Update]):  # type: ignore[misc]
    """Loads whole versions from the weight channel, in Hugging Face names."""

    init_info_cls = NoInit
    update_info_cls = Update
    digest = ""
    """Of the last version that was loaded completely, computed here from the bytes that were loaded."""

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Put the model back into the state in which it takes checkpoint weights.

        On the CPU the linear layers' parameters have been packed away; without this they look empty.
        """
        self._reader: WeightReader | None = None
        self._repair = True
        # Read now: what is tied comes once as long as it is tied, and the next line separates it.
        self._wanted = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        """Load one file. Raises WeightsError when it is not what was announced, or does not hold the whole model."""
        # Held until the end of the update: layers that are processed then still refer to the mapped memory.
        self._reader = reader = WeightReader(Path(update_info.path))
        self._repair = update_info.repair_tied_head
        if reader.digest != update_info.digest:
            raise WeightsError(f"{update_info.path} has digest {reader.digest}, not {update_info.digest}")
        loaded = self.model.load_weights(self.tensors(reader).items())
        if missing := sorted(self._wanted - set(loaded)):
            raise WeightsError(
                f"{update_info.path} leaves {len(missing)} of the model's parameters as they were "
                f"({missing[0]} for one): export the whole model"
            )

    def tensors(self, reader: WeightReader) -> Mapping[str, torch.Tensor]:
        """What is loaded of a file: all of it. Tests plant faults here."""
        return reader.tensors

    def finish_weight_update(self) -> None:
        """Pack the parameters again, and remember what was loaded."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self._repair:
            repack_heads(self.model)
        if self._reader is not None:
            self.digest = self._reader.digest
            self._reader = None

    def shutdown(self) -> None:
        """Let go of the last file."""
        self._reader = None


class ReportsWeights:
    """What our workers answer beyond vLLM's own (`worker_extension_cls`)."""

    weight_transfer_engine: SharedMemoryTransfer

    def asyncflow_digest(self) -> str:
        """Digest of the weights that this worker has loaded; empty when it serves those it started with."""
        return self.weight_transfer_engine.digest


def repack_heads(model: torch.nn.Module) -> None:
    """Pack the output matrix of a CPU model again.

    For its CPU kernels vLLM packs a copy of every matrix. A head that is tied to the embedding loads nothing under its
    own name, so a reload leaves its copy as it was: log-probs come from the old head and nothing complains.
    Elsewhere than on the CPU there are no copies and nothing to do.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
