"""TransferQueue with its SimpleStorage: a controller and two storage units, Ray actors that keep all in memory.

Runs in the environment that `make peers` makes.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import transfer_queue
from omegaconf import OmegaConf
from tensordict import TensorDict

from benchmarks.queues.base import KINDS, Got, MissingFeature, Place, Queue, Side
from benchmarks.queues.samples import Ragged, Samples, rows_of

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
            else torch.from_numpy(column)
            for name, column in samples.items()
        }
        return TensorDict(columns, batch_size=rows_of(samples))

    def put(self, batch: TensorDict) -> None:
        self.raw.put(data=batch, partition_id=self._partition)

    def get(self, rows: int, *, reader: str = "reader", timeout: float = 0.0, interval: float = 0.0) -> Got | None:
        fields = list(self._kind.readers[reader])
        deadline = time.monotonic() + timeout
        while True:
            meta = self.raw.get_meta(
                data_fields=fields, batch_size=rows, partition_id=self._partition, mode="fetch", task_name=reader
            )
            if meta.size:
                data = self.raw.get_data(meta)
                return Got(columns={name: data[name] for name in fields}, rows=meta.size, handle=meta)
            if time.monotonic() >= deadline:
                return None
            if interval:
                time.sleep(interval)

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

    def __init__(self, config: Any, kind: str) -> None:
        self.address = (config, f"bench-{uuid.uuid4().hex[:8]}", kind)

    def servers(self) -> list[int]:
        """The controller and the storage units; not the rest of Ray."""
        return [
            process.pid
            for process in psutil.Process().children(recursive=True)
            if any(actor in " ".join(process.cmdline()) for actor in ACTORS)
        ]


class TransferQueueSide(Side):
    name = "transferqueue"

    def __init__(self, folder: Path, *, polling: bool = True, sampler: Any = "SequentialSampler") -> None:
        """`polling`: a fetch that finds too little answers so at once; otherwise the controller sleeps in it."""
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
        self.config = transfer_queue.init(
            OmegaConf.create(
                {
                    "controller": {"polling_mode": polling, "sampler": sampler},
                    "backend": {"SimpleStorage": {"num_data_storage_units": 2}},
                },
                flags={"allow_objects": True},
            )
        )

    @contextmanager
    def open(self, kind: str, **terms: Any) -> Iterator[Partition]:
        if terms:
            raise MissingFeature(f"it keeps samples in memory only, so there is no {', '.join(terms)}")
        yield Partition(self.config, kind)

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


def side(folder: Path) -> TransferQueueSide:
    return TransferQueueSide(folder)
