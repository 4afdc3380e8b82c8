"""The weight channel: what is published arrives whole or not at all, and nothing is left behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from asyncflow.engines.weights.channel import WeightChannel, WeightPublisher, WeightReader, weights_digest
from asyncflow.errors import WeightsError
from asyncflow.types import PolicyVersion

OWNER = """
import sys
from pathlib import Path
import torch
from asyncflow.engines.weights.channel import WeightChannel
from asyncflow.types import PolicyVersion

channel = WeightChannel(root=Path(sys.argv[1]))
channel.publish(PolicyVersion(n=0), [("w", torch.ones(4))])
print(channel.folder, flush=True)
sys.stdin.read()
"""


def version(n: int) -> PolicyVersion:
    return PolicyVersion(n=n)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed.weight": torch.randn(8, 5, generator=generator).to(torch.bfloat16),
        "model.norm.weight": torch.randn(5, generator=generator),
        "model.scale": torch.randn((), generator=generator),
        "model.empty": torch.empty(0, 3),
        "model.mask": torch.tensor([True, False, True]),
    }


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[WeightChannel]:
    channel = WeightChannel(root=tmp_path)
    yield channel
    channel.close()


def files(channel: WeightChannel) -> set[str]:
    return {path.name for path in channel.folder.iterdir()}


def test_what_is_published_is_what_arrives(channel: WeightChannel) -> None:
    # given
    tensors = weights()
    # when
    published = channel.publish(version(3), tensors.items())
    # then
    arrived = dict(published.tensors())
    assert list(arrived) == list(tensors)
    for name, tensor in tensors.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor)
    assert channel.latest() is published
    assert (published.version, published.path.name) == (version(3), "0.3.weights")


def test_tensors_that_are_not_contiguous_arrive_row_by_row(channel: WeightChannel) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    published = channel.publish(version(0), [("transposed", matrix.t())])
    assert torch.equal(dict(published.tensors())["transposed"], matrix.t())


def test_the_tensors_of_a_file_begin_at_multiples_of_64_bytes(channel: WeightChannel) -> None:
    published = channel.publish(version(0), weights().items())
    with WeightReader(published.path) as reader:
        starts = [tensor.data_ptr() for tensor in reader.tensors.values() if tensor.numel()]
    assert all(start % 64 == 0 for start in starts)


def test_equal_weights_have_equal_digests_in_any_order_and_version(channel: WeightChannel) -> None:
    # given
    tensors = weights()
    # when
    first = channel.publish(version(0), tensors.items())
    second = channel.publish(version(1), reversed(tensors.items()))
    # then
    assert first.digest == second.digest == weights_digest(tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1e-7},
        lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"].reshape(5, 1)},
        lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"].view(torch.int32)},
        lambda tensors: tensors | {"model.scale": tensors["model.scale"].reshape(1)},
        lambda tensors: {name.replace("norm", "gnorm"): tensor for name, tensor in tensors.items()},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if tensor.numel()},
    ],
    ids=["value", "shape", "dtype", "rank", "name", "missing"],
)
def test_the_digest_tells_weights_apart_that_differ_in_anything(change) -> None:  # type: ignore[no-untyped-def]
    assert weights_digest(change(weights())) != weights_digest(weights())


def test_the_last_k_versions_are_kept(tmp_path: Path) -> None:
    # given
    channel = WeightChannel(keep=2, root=tmp_path)
    # when
    for n in range(4):
        channel.publish(version(n), weights(n).items())
    # then: a retired file waits to be written over, under its old name
    for n in (2, 3):
        with WeightReader(channel.folder / f"0.{n}.weights") as reader:
            assert reader.digest == weights_digest(weights(n))
    assert len(files(channel)) == 3
    channel.close()


def test_a_version_that_somebody_still_holds_is_kept(channel: WeightChannel) -> None:
    # given
    held = channel.publish(version(0), weights(0).items())
    # when
    for n in range(1, 6):
        channel.publish(version(n), weights(n).items())
    # then
    assert weights_digest(dict(held.tensors())) == weights_digest(weights(0))


def test_a_map_that_is_open_stays_what_it_is_when_its_version_goes(tmp_path: Path) -> None:
    # given
    channel = WeightChannel(keep=1, root=tmp_path)
    reader = WeightReader(channel.publish(version(0), weights(0).items()).path)
    tensors = dict(reader.tensors)
    reader.close()
    # when
    for n in range(1, 5):
        channel.publish(version(n), weights(n).items())
    channel.close()
    # then
    assert not channel.folder.exists()
    assert weights_digest(tensors) == weights_digest(weights(0))


def test_a_reader_cannot_change_what_others_read(channel: WeightChannel) -> None:
    # given
    published = channel.publish(version(0), weights().items())
    # when
    with WeightReader(published.path) as reader:
        reader.tensors["model.norm.weight"].zero_()
    # then
    assert weights_digest(dict(published.tensors())) == weights_digest(weights())


def test_a_version_that_is_gone_is_refused(tmp_path: Path) -> None:
    channel = WeightChannel(keep=1, root=tmp_path)
    path = channel.publish(version(0), weights().items()).path
    for n in range(1, 4):
        channel.publish(version(n), weights(n).items())
    with pytest.raises(WeightsError, match="no longer kept"):
        WeightReader(path)
    channel.close()


def test_a_file_that_holds_another_version_by_now_is_refused(channel: WeightChannel, tmp_path: Path) -> None:
    path = channel.publish(version(0), weights().items()).path
    renamed = path.rename(tmp_path / "0.7.weights")
    with pytest.raises(WeightsError, match=r"now holds version 0\.0"):
        WeightReader(renamed)


def test_tied_weights_must_come_once(channel: WeightChannel) -> None:
    embedding = torch.randn(4, 4)
    with pytest.raises(WeightsError, match=r"embed and head are the same memory: export tied weights once"):
        channel.publish(version(0), [("embed", embedding), ("norm", torch.ones(4)), ("head", embedding)])
    assert channel.latest() is None


def test_parts_of_one_buffer_are_not_tied(channel: WeightChannel) -> None:
    flat = torch.arange(8.0)
    published = channel.publish(version(0), [("a", flat[:4]), ("b", flat[4:])])
    assert torch.equal(dict(published.tensors())["b"], flat[4:])


def test_a_name_must_come_once(channel: WeightChannel) -> None:
    with pytest.raises(WeightsError, match="norm is published twice"):
        channel.publish(version(0), [("norm", torch.ones(4)), ("norm", torch.ones(4))])


def test_versions_only_go_up(channel: WeightChannel) -> None:
    channel.publish(version(4), weights().items())
    with pytest.raises(WeightsError, match=r"0\.4 is not newer than 0\.4"):
        channel.publish(version(4), weights().items())
    later_incarnation = PolicyVersion(incarnation=1, n=2)
    assert channel.publish(later_incarnation, weights().items()).version == later_incarnation


def test_a_file_that_was_cut_off_is_refused(channel: WeightChannel, tmp_path: Path) -> None:
    # given
    whole = channel.publish(version(0), weights().items()).path.read_bytes()
    torn = tmp_path / "0.0.weights"
    # then
    for length in [*range(0, len(whole) - 64, 7)]:
        torn.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            WeightReader(torn)


def test_every_byte_that_is_flipped_is_refused_or_makes_no_difference(channel: WeightChannel, tmp_path: Path) -> None:
    # given
    published = channel.publish(version(0), weights().items())
    whole = published.path.read_bytes()
    flipped = tmp_path / "0.0.weights"
    refused = 0
    # then
    for position, bit in itertools.product(range(len(whole)), (0, 7)):
        changed = bytearray(whole)
        changed[position] ^= 1 << bit
        flipped.write_bytes(changed)
        try:
            with WeightReader(flipped) as reader:
                assert (reader.version, reader.digest) == (version(0), published.digest)
                assert weights_digest(reader.tensors) == published.digest
        except WeightsError:
            refused += 1
    # Padding and spaces of the manifest carry nothing.
    assert refused > len(whole)


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(channel: WeightChannel) -> None:
    # given: 64 TiB that take no memory
    huge = torch.zeros(1).expand(1 << 44)
    # when
    with pytest.raises(WeightsError, match=r"it needs \d+ bytes and \d+ are free; enlarge"):
        channel.publish(version(0), [("huge", huge)])
    # then
    assert files(channel) == set()
    assert channel.publish(version(0), weights().items()).nbytes > 0


def test_a_dtype_that_the_format_does_not_know_is_refused(channel: WeightChannel) -> None:
    with pytest.raises(WeightsError, match="w is complex64: export one of"):
        channel.publish(version(0), [("w", torch.zeros(2, dtype=torch.complex64))])


def test_who_waits_is_woken_by_a_newer_version(channel: WeightChannel) -> None:
    # given
    channel.publish(version(1), weights().items())
    waiting = threading.Event()
    seen: list[object] = []

    def wait() -> None:
        waiting.set()
        seen.append(channel.wait_newer(version(1), timeout=30))

    waiter = threading.Thread(target=wait)
    waiter.start()
    waiting.wait()
    # when
    published = channel.publish(version(2), weights(2).items())
    waiter.join()
    # then
    assert seen == [published]
    assert channel.wait_newer(None, timeout=0) is published
    assert channel.wait_newer(version(2), timeout=0) is None


def test_closing_wakes_who_waits_and_removes_everything(tmp_path: Path) -> None:
    # given
    channel = WeightChannel(root=tmp_path)
    channel.publish(version(0), weights().items())
    waiting = threading.Event()
    seen: list[object] = []

    def wait() -> None:
        waiting.set()
        seen.append(channel.wait_newer(version(0), timeout=30))

    waiter = threading.Thread(target=wait)
    waiter.start()
    waiting.wait()
    # when
    channel.close()
    channel.close()
    waiter.join()
    # then
    assert seen == [None]
    assert channel.latest() is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WeightsError, match="closed"):
        channel.publish(version(1), weights().items())


def test_a_root_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no folder for weights can be made .*missing"):
        WeightPublisher(root=tmp_path / "missing")


def test_a_killed_run_is_swept_up_by_the_next_and_a_living_one_is_not(tmp_path: Path) -> None:
    # given
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        folders = [Path(owner.stdout.readline().strip()) for owner in owners if owner.stdout is not None]
        killed, living = owners
        # when
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert all((folder / "0.0.weights").exists() for folder in folders)
        channel = WeightChannel(root=tmp_path)
        # then
        assert not folders[0].exists()
        assert (folders[1] / "0.0.weights").exists()
        channel.close()
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()
    assert living.returncode is not None
