"""The weight channel: how one version of the policy gets from the learner to the engines of the same host.

A version is one flat file in shared memory. The learner writes it aside and renames it; an engine, in whatever process,
maps it and sees tensors. Nobody waits for anybody: a file that is mapped stays what it is even after its name is gone.

    <root>/asyncflow-weights-…/          one folder a run, locked with flock for the life of its owner
        0.7.weights                      policy version 0.7
        0.8.weights

    file = magic "AFWEIGHT" | format version u32 | manifest length u32 | manifest (JSON) | padding | tensors
    manifest = {"version": "0.7", "digest": "…", "tensors": [{"name", "dtype", "shape", "offset"}, …]}

Numbers are little-endian, tensors row-major; they begin at multiples of 64 bytes, and offsets count from the first.
The digest is xxh3-128 over names, dtypes, shapes and bytes in the order of the names (`weights_digest`), so it does not
depend on the layout, and equal weights have equal digests.

A run that is killed leaves its folder behind; the next publisher removes it (`owned`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
import shutil
import struct
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xxhash

from asyncflow.engines.weights.owned import OwnedFolder, try_lock
from asyncflow.errors import WeightsError
from asyncflow.types import PolicyVersion

MAGIC = b"AFWEIGHT"
FORMAT = 1
SUFFIX = ".weights"
_HEADER = struct.Struct("<8sII")
_ALIGNMENT = 64
FOLDER_PREFIX = "asyncflow-weights-"
"""Of the folder in which a run publishes its weights."""
_DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """xxh3-128 (hex) over name, dtype, shape and bytes of every tensor, in the order of the names.

    The tensors must be contiguous and in host memory.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, _dtype_name(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


class WeightReader:
    """One published file, mapped and checked.

    The map is copy-on-write: torch sees memory that it may write to, the file never changes. The tensors keep the map
    alive, and the map keeps the file from being recycled, so they stay valid for as long as somebody holds them.
    """

    version: PolicyVersion
    digest: str
    """Digest of the bytes that were read, equal to the one in the manifest."""
    tensors: Mapping[str, torch.Tensor]
    """Every tensor by its Hugging Face name, in the order of publication; views of the map."""

    def __init__(self, path: Path) -> None:
        """Map `path`. Raises WeightsError when it is gone, not complete, or its bytes do not have its digest."""
        try:
            content = _map_shared(path)
        except OSError:
            raise WeightsError(f"{path} is no longer kept: take the latest version, or keep more of them") from None
        except ValueError:
            raise WeightsError(f"{path} is empty: it was not written by a weight channel") from None
        try:
            manifest, start = _read_manifest(content)
            self.version = PolicyVersion.parse(manifest["version"])
            self.digest = manifest["digest"]
            self.tensors = {entry["name"]: _view(content, start, entry) for entry in manifest["tensors"]}
        except (struct.error, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise WeightsError(f"{path} is torn or not a weight file ({error}): publish the version again") from error
        if f"{self.version}{SUFFIX}" != path.name:
            raise WeightsError(
                f"{path} now holds version {self.version}: take the latest version, or keep more of them"
            )
        if (digest := weights_digest(self.tensors)) != self.digest:
            raise WeightsError(f"{path} has digest {digest} where {self.digest} was written: publish the version again")

    def close(self) -> None:
        """Let go of the tensors; may be called twice. The map itself goes with the last view of it: closing it here
        would pull the memory from under whoever still holds one."""
        self.tensors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(kw_only=True, eq=False)
class PublishedWeights:
    """A version in the channel: a `WeightSnapshot`. Its file stays as long as somebody in this process holds it."""

    version: PolicyVersion
    digest: str
    path: Path
    nbytes: int
    """Size of the file."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor under its Hugging Face name. Raises WeightsError when the bytes do not have this digest."""
        with WeightReader(self.path) as reader:
            if reader.digest != self.digest:
                raise WeightsError(
                    f"{self.path} has digest {reader.digest}, not {self.digest}: take the latest version"
                )
            yield from reader.tensors.items()


class WeightPublisher:
    """Writes versions into a folder of its own and keeps the last `keep`, plus those that this process still holds.

    Another process may have a version mapped when it goes: unlinking leaves its map intact, and its file is not
    recycled before the map is gone (readers hold a shared lock on it). One thread publishes.
    """

    def __init__(self, *, keep: int = 2, root: Path | None = None) -> None:
        """Make the folder below `root` (None: /dev/shm, or the temporary folder where there is none).

        Removes the folders of runs that were killed. Raises WeightsError when the folder cannot be made.
        """
        assert keep >= 1, keep
        try:
            self._owned = OwnedFolder(FOLDER_PREFIX, root)
        except OSError as error:
            raise WeightsError(f"no folder for weights can be made ({error}): name a root that is writable") from error
        self.folder = self._owned.path
        self._kept: deque[PublishedWeights] = deque(maxlen=keep)
        self._retired: deque[Path] = deque()
        self._last: PolicyVersion | None = None

    def publish(self, version: PolicyVersion, tensors: Iterable[tuple[str, torch.Tensor]]) -> PublishedWeights:
        """Write one version and return it when it is complete. Tied weights come once, under one name.

        `tensors` is held until everything is written. Raises WeightsError when the version is not newer than the last
        one, a name or its memory comes twice, a dtype has no place in the format, or there is not enough room.
        """
        if self._owned.removed:
            raise WeightsError("the weight channel is closed: publish before the run ends")
        if self._last is not None and version <= self._last:
            raise WeightsError(f"version {version} is not newer than {self._last}: count publications up")
        sources = _distinct(tensors)
        entries, nbytes = _layout(sources)
        draft = _header(version, "0" * 32, entries)
        path = self.folder / f"{version}{SUFFIX}"
        aside = self.folder / "writing"
        try:
            with self._writable(aside, len(draft) + nbytes) as content:
                views = {entry["name"]: _view(content, len(draft), entry) for entry in entries}
                for name, source in sources.items():
                    views[name].copy_(source)
                digest = weights_digest(views)
                content[: len(draft)] = _header(version, digest, entries)
            aside.rename(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise WeightsError(f"version {version} cannot be written to {self.folder}: {error}") from error
        published = PublishedWeights(version=version, digest=digest, path=path, nbytes=len(draft) + nbytes)
        # When nobody holds it any more, its file becomes the next version's.
        weakref.finalize(published, self._retired.append, path).atexit = False
        self._kept.append(published)
        self._last = version
        return published

    def close(self) -> None:
        """Remove everything. Maps that are open stay valid. May be called twice."""
        self._kept.clear()
        self._owned.remove()

    @contextlib.contextmanager
    def _writable(self, aside: Path, nbytes: int) -> Iterator[mmap.mmap]:
        """A map of `nbytes` under the name `aside`: of a retired file when there is one, else of a new one.

        Memory is reserved before anything is written: a store into a map that the file system cannot back would end
        the process with SIGBUS, where a reservation that fails is an error that can be told.
        """
        descriptor = self._recycled(aside)
        if descriptor is None:
            aside.unlink(missing_ok=True)
            descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            free = shutil.disk_usage(self.folder).free
            missing = nbytes - os.fstat(descriptor).st_blocks * 512
            if missing > free:
                raise OSError(
                    f"it needs {missing} bytes and {free} are free; "
                    f"enlarge {self.folder.parent} (a container: --shm-size), keep fewer versions, or use another root"
                )
            os.posix_fallocate(descriptor, 0, nbytes)
            os.ftruncate(descriptor, nbytes)
            yield mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            # The map holds a copy of the descriptor, and with it the lock of a recycled file.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _recycled(self, aside: Path) -> int | None:
        """Open a retired file that nobody maps under the name `aside`, locked until it is closed; unlink the others.

        Its pages exist already, which makes the next version about twice as fast to write as in a new file.
        """
        descriptor = None
        while self._retired:
            path = self._retired.popleft()
            if descriptor is None and (descriptor := try_lock(path, os.O_RDWR)) is not None:
                path.rename(aside)
            else:
                path.unlink(missing_ok=True)
        return descriptor


class WeightChannel:
    """What the learner publishes and the rollout workers of the same process take. Safe to share between threads."""

    def __init__(self, *, keep: int = 2, root: Path | None = None) -> None:
        """`keep` and `root` as for `WeightPublisher`."""
        self._publisher = WeightPublisher(keep=keep, root=root)
        self._changed = threading.Condition()
        self._latest: PublishedWeights | None = None
        self._closed = False

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._publisher.folder

    def publish(self, version: PolicyVersion, tensors: Iterable[tuple[str, torch.Tensor]]) -> PublishedWeights:
        """Publish a version and wake those who wait for it. Raises WeightsError, as `WeightPublisher.publish` does."""
        published = self._publisher.publish(version, tensors)
        with self._changed:
            self._latest = None if self._closed else published
            self._changed.notify_all()
        return published

    def latest(self) -> PublishedWeights | None:
        """The newest version, or None before the first and after `close`."""
        with self._changed:
            return self._latest

    def wait_newer(self, than: PolicyVersion | None, timeout: float) -> PublishedWeights | None:
        """The newest version as soon as there is one newer than `than` (None: any); None after `timeout` seconds, or
        when the channel is closed."""

        def arrived() -> bool:
            return self._closed or (self._latest is not None and (than is None or self._latest.version > than))

        with self._changed:
            return self._latest if self._changed.wait_for(arrived, timeout) else None

    def close(self) -> None:
        """Remove everything and wake those who wait. May be called twice."""
        with self._changed:
            self._closed = True
            self._latest = None
            self._changed.notify_all()
        self._publisher.close()


def _map_shared(path: Path) -> mmap.mmap:
    """A copy-on-write map of a file, which holds a shared lock on it until the last view of it is gone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Taken when the publisher is writing another version over it, which is as good as gone.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)


def _read_manifest(content: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The manifest, and where the tensors begin. Raises ValueError or struct.error for anything else."""
    magic, version, length = _HEADER.unpack_from(content)
    if magic != MAGIC:
        raise ValueError("it does not begin like one")
    if version != FORMAT:
        raise ValueError(f"format {version} where this program reads {FORMAT}")
    end = _HEADER.size + length
    return json.loads(content[_HEADER.size : end]), _aligned(end)


def _view(content: mmap.mmap, start: int, entry: Mapping[str, Any]) -> torch.Tensor:
    """The tensor of a manifest's entry, as a view that keeps the map alive. Raises when it is not inside the map."""
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + entry["offset"]).reshape(shape)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _distinct(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors by name. All of them are held at once, so that equal addresses mean the same memory."""
    sources: dict[str, torch.Tensor] = {}
    names: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors:
        if name in sources:
            raise WeightsError(f"{name} is published twice: export every tensor once")
        if _dtype_name(tensor.dtype) not in _DTYPES:
            raise WeightsError(f"{name} is {_dtype_name(tensor.dtype)}: export one of {', '.join(_DTYPES)}")
        sources[name] = tensor.detach()
        if tensor.numel():
            other = names.setdefault((tensor.device, tensor.data_ptr()), name)
            if other != name:
                raise WeightsError(f"{other} and {name} are the same memory: export tied weights once, under one name")
    return sources


def _layout(sources: Mapping[str, torch.Tensor]) -> tuple[list[dict[str, Any]], int]:
    """One entry of the manifest for each tensor, and the bytes that all of them take."""
    entries: list[dict[str, Any]] = []
    offset = 0
    for name, tensor in sources.items():
        entries.append(
            {"name": name, "dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape), "offset": offset}
        )
        offset += _aligned(tensor.numel() * tensor.element_size())
    return entries, offset


def _header(version: PolicyVersion, digest: str, entries: list[dict[str, Any]]) -> bytes:
    """Everything before the first tensor, padded to the alignment."""
    manifest = json.dumps({"version": str(version), "digest": digest, "tensors": entries}).encode()
    header = _HEADER.pack(MAGIC, FORMAT, len(manifest)) + manifest
    return header.ljust(_aligned(len(header)), b"\0")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
