"""What the machine gives: nothing that moves samples between processes is faster than these."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from benchmarks.queues.figures import processes
from benchmarks.queues.samples import Ragged, finished

GIB = 1 << 30


def floors(folder: Path, *, repeats: int = 15) -> dict[str, float]:
    """One turn of all of them, in GB/s (10⁹ bytes) of samples of 8.2 kB in batches of 1024, and ms."""
    samples = finished(1024)
    arrays = [
        pa.LargeListArray.from_arrays(pa.array(column.offsets), pa.array(column.values))
        if isinstance(column, Ragged)
        else pa.array(column)
        for column in samples.values()
    ]
    batch = pa.record_batch(arrays, names=list(samples))
    size = pa.ipc.get_record_batch_size(batch)
    result = {"memcpy_gb_per_s": _memcpy(), "pipe_round_trip_ms": _pipe()}
    target = pa.allocate_buffer(size + 4096)
    data = memoryview(target)
    np.frombuffer(data, np.uint8)[:] = 0  # so that its pages are there

    def write() -> None:
        with pa.ipc.new_stream(pa.FixedSizeBufferWriter(target), batch.schema) as stream:
            stream.write_batch(batch)

    def read() -> None:
        found = pa.ipc.open_stream(pa.BufferReader(target)).read_next_batch()
        assert len(found) == len(batch)

    result["arrow_ipc_write_gb_per_s"] = size / _median(write, repeats) / 1e9
    result["arrow_ipc_read_samples_per_s"] = len(batch) / _median(read, repeats)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        file = os.open(Path(name, "file"), os.O_RDWR | os.O_CREAT)
        try:
            os.posix_fallocate(file, 0, len(data))
            result["file_rewrite_gb_per_s"] = size / _median(lambda: os.pwrite(file, data, 0), repeats) / 1e9
            end = iter(range(len(data), (repeats + 2) * len(data), len(data)))
            result["file_append_gb_per_s"] = size / _median(lambda: os.pwrite(file, data, next(end)), repeats) / 1e9

            def synced() -> None:
                os.pwrite(file, data, 0)
                os.fdatasync(file)

            result["file_fdatasync_gb_per_s"] = size / _median(synced, repeats) / 1e9
        finally:
            os.close(file)
    result |= _flight(batch, size, repeats)
    return result


def _median(work: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _memcpy() -> float:
    source = np.ones(GIB // 2, np.uint8)
    target = np.zeros_like(source)
    return source.nbytes / _median(lambda: np.copyto(target, source), 5) / 1e9


def _pipe() -> float:
    here, there = processes.Pipe()
    process = processes.Process(target=_echo, args=(there,), daemon=True)
    process.start()
    here.recv_bytes()

    def trip() -> None:
        here.send_bytes(b"x")
        here.recv_bytes()

    seconds = _median(trip, 1000)
    here.send_bytes(b"")
    process.join()
    return 1000 * seconds


def _echo(pipe: Connection) -> None:
    pipe.send_bytes(b"ready")
    while message := pipe.recv_bytes():
        pipe.send_bytes(message)


def _flight(batch: pa.RecordBatch, size: int, repeats: int) -> dict[str, float]:
    here, there = processes.Pipe()
    process = processes.Process(target=_flight_server, args=(there,), daemon=True)
    process.start()
    try:
        client = flight.connect(f"grpc://127.0.0.1:{here.recv()}")
        path = flight.FlightDescriptor.for_path("batch")

        def put() -> None:
            writer, answers = client.do_put(path, batch.schema)
            writer.write_batch(batch)
            writer.done_writing()
            answers.read()
            writer.close()

        put_s = _median(put, repeats)
        get_s = _median(lambda: client.do_get(flight.Ticket(b"batch")).read_all(), repeats)
        action_s = _median(lambda: list(client.do_action(flight.Action("nothing", b""))), 200)
        client.close()
    finally:
        process.kill()
        process.join()
    return {
        "flight_put_gb_per_s": size / put_s / 1e9,
        "flight_get_gb_per_s": size / get_s / 1e9,
        "flight_get_samples_per_s": len(batch) / get_s,
        "flight_action_ms": 1000 * action_s,
    }


def _flight_server(pipe: Connection) -> None:
    class Server(flight.FlightServerBase):  # type: ignore[misc]
        kept: Any = None

        def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
            self.kept = reader.read_all()
            writer.write(b"kept")

        def do_get(self, context: Any, ticket: Any) -> Any:
            return flight.RecordBatchStream(self.kept)

        def do_action(self, context: Any, action: Any) -> list[Any]:
            return [b""]

    server = Server("grpc://127.0.0.1:0")
    pipe.send(server.port)
    server.serve()
