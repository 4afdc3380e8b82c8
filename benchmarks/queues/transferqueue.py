"""TransferQueue with its SimpleStorage: a controller and two storage units, Ray actors that keep all in memory.

Runs in the environment that `make peers` makes.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
import transfer_queue
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict

from benchmarks.queues.base import KINDS, Got, MissingFeature, Place, Queue, Side
from benchmarks.queues.samples import Ragged, Samples, finished, rows_of

ACTORS = ("TransferQueueController", "SimpleStorageUnit")


class TransferQueueClient(Queue):
    """A partition is a queue."""

    def __init__(self, config: Any, partition: str, kind: str) -> None:
        self._kind = KINDS[kind]
        self._partition = partition
        self.raw = transfer_queue.TransferQueueClient(f"bench_{uuid.uuid4().hex[:8]}", config.controller.zmq_info)
        backend = config.backend.storage_backend
        self.raw.initialize_storage_manager(manager_type=backend, config=config.backend[backend])

    def prepare(self, samples: Samples) -> TensorDict:
        columns = {
            name: torch.nested.nested_tensor_from_jagged(
                torch.from_numpy(column.values), torch.from_numpy(column.offsets)
            )
            if isinstance(column, Ragged)
            else (NonTensorStack(*column) if isinstance(column, list) else torch.from_numpy(column))
            for name, column in samples.items()
        }
        return TensorDict(columns, batch_size=rows_of(samples))

    def put(self, batch: TensorDict) -> None:
        self.raw.put(data=batch, partition_id=self._partition)

    def put_members(self, order: Sequence[tuple[int, int]], group_size: int) -> None:
        for group, _ in order:
            one = dict(finished(1, prompt=2, response=4))
            one["prompt_ids"] = Ragged(values=np.array([group]), offsets=np.array([0, 1]))
            self.put(self.prepare(one))

    def take(
        self, rows: int, *, reader: str = "reader", timeout: float = 0.0, interval: float = 0.0, hold: float = 600.0
    ) -> Any | None:
        fields = list(self._kind.readers[reader])
        deadline = time.monotonic() + timeout
        while True:
            meta = self.raw.get_meta(
                data_fields=fields, batch_size=rows, partition_id=self._partition, mode="fetch", task_name=reader
            )
            if meta.size:
                return meta
            if time.monotonic() >= deadline:
                return None
            if interval:
                time.sleep(interval)

    def read(self, taken: Any) -> Mapping[str, torch.Tensor]:
        data = self.raw.get_data(taken)
        return {name: data[name] for name in taken.field_names}

    def done(self, got: Got) -> None:
        """Samples count as consumed when their metadata are handed out: there is nothing to say."""

    def clear(self) -> None:
        self.raw.clear_partition(self._partition)

    def close(self) -> None:
        self.raw.close()


def connect(address: tuple[Any, str, str]) -> TransferQueueClient:
    logging.disable(logging.WARNING)
    return TransferQueueClient(*address)


class Partition(Place):
    connect = staticmethod(connect)

    def __init__(self, side: TransferQueueSide, kind: str) -> None:
        self._side = side
        self.address = (side.config, f"bench-{uuid.uuid4().hex[:8]}", kind)

    def servers(self) -> list[int]:
        """The controller, then the storage units; not the rest of Ray."""
        found = [(process.pid, " ".join(process.cmdline())) for process in psutil.Process().children(recursive=True)]
        return [pid for actor in ACTORS for pid, command in found if actor in command]

    def checkpoint(self) -> None:
        transfer_queue.save_checkpoint(self._side.folder / "checkpoint")

    def restart(self, *, from_checkpoint: bool) -> None:
        self._side.restart()
        self.address = (self._side.config, *self.address[1:])
        if from_checkpoint:
            transfer_queue.load_checkpoint(self._side.folder / "checkpoint")


class TransferQueueSide(Side):
    name = "transferqueue"

    def __init__(self, folder: Path, *, polling: bool = True, group: int = 0, limit: int | None = None) -> None:
        """`polling`: a fetch that finds too little answers so at once; otherwise the controller sleeps in it (which is
        its default). `group`: use its sampler for groups of this size. `limit`: of samples, for all storage units."""
        self.folder = folder
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        logging.disable(logging.WARNING)
        if not ray.is_initialized():
            # Paths of sockets have at most 107 bytes, so Ray's folder has to be a short one.
            ray.init(
                num_cpus=4,
                object_store_memory=1 << 30,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
        sampler = transfer_queue.GRPOGroupNSampler(n_samples_per_prompt=group) if group else "SequentialSampler"
        self._wanted = OmegaConf.create(
            {
                "controller": {"polling_mode": polling, "sampler": sampler},
                "backend": {"SimpleStorage": {"num_data_storage_units": 2, "total_storage_size": limit}},
            },
            flags={"allow_objects": True},
        )
        self.config = transfer_queue.init(self._wanted)

    def restart(self) -> None:
        """Close what is left and initialise it again."""
        transfer_queue.close()
        self.config = transfer_queue.init(self._wanted)

    @contextmanager
    def open(self, kind: str, **terms: Any) -> Iterator[Partition]:
        if terms:
            raise MissingFeature(f"it keeps samples in memory only, so there is no {', '.join(terms)}")
        yield Partition(self, kind)

    def about(self) -> dict[str, Any]:
        return {
            "versions": {name: version(name) for name in ("TransferQueue", "ray", "torch", "tensordict", "pyzmq")},
            "medium": "memory of its storage units",
            "durability": "none: gone with the processes",
            "checksums": False,
            "processes": "controller and two storage units (Ray actors), Ray's own, and the clients",
            "transport": "ZeroMQ over TCP loopback",
        }

    def close(self) -> None:
        transfer_queue.close()
        ray.shutdown()


def side(folder: Path, **settings: Any) -> TransferQueueSide:
    return TransferQueueSide(folder, **settings)
