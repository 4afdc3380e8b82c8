"""An engine in a process of its own answers as it does in this one, and neither end outlives the other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from asyncflow.engines.fake import TABLE, FakeRollout
from asyncflow.engines.models import resolve_model
from asyncflow.engines.process import ProcessEngine
from asyncflow.engines.weights.channel import WeightChannel
from asyncflow.errors import EngineError, PromptTooLong, WeightsError
from asyncflow.launch import resolve
from asyncflow.types import PolicyVersion
from tests.conftest import ROOT, TINY
from tests.test_fake_engines import request

SOON = 60.0
"""Seconds after which a test gives up."""


def engine(**options: Any) -> ProcessEngine:
    config = resolve(TINY, ["max_new_tokens=12", "rollout.max_model_len=64", f"rollout.options={options}"])
    return ProcessEngine(config, resolve_model("tiny"), FakeRollout.capabilities)


def child(made: ProcessEngine) -> psutil.Process:
    assert made._process is not None
    return psutil.Process(made._process.pid)


def during(scenario: Callable[[ProcessEngine], Coroutine[Any, Any, None]], **options: Any) -> psutil.Process:
    """Run a scenario with a started engine, stop it, and return its process."""

    async def whole() -> psutil.Process:
        made = engine(**options)
        await made.start()
        process = child(made)
        try:
            await scenario(made)
        finally:
            await made.stop()
            await made.stop()
        return process

    return asyncio.run(asyncio.wait_for(whole(), SOON))


def test_it_answers_as_the_engine_does_in_this_process() -> None:
    async def scenario(made: ProcessEngine) -> None:
        local = FakeRollout(resolve_model("tiny"), max_model_len=64)
        await local.start()
        requests = [request(str(i), seed=i) for i in range(20)]
        there = await asyncio.gather(*map(made.generate, requests))
        here = await asyncio.gather(*map(local.generate, requests))
        for a, b in zip(there, here, strict=True):
            for name in ("token_ids", "logprobs", "token_versions"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            assert (a.text, a.finish_reason) == (b.text, b.finish_reason)

    assert not during(scenario).is_running()


def test_weights_are_loaded_from_the_channel_and_a_wrong_digest_is_refused() -> None:
    async def scenario(made: ProcessEngine) -> None:
        table = torch.full((128, 128), -50.0)
        table[:, 7] = 50.0
        snapshot = channel.publish(PolicyVersion(n=3), iter([(TABLE, table)]))

        served = await made.load_weights(snapshot, "boundary")

        assert (served.version, served.digest) == (snapshot.version, snapshot.digest)
        completion = await made.generate(request())
        assert set(completion.token_ids.tolist()) == {7}
        assert set(completion.token_versions.tolist()) == {PolicyVersion(n=3).packed}
        with pytest.raises(WeightsError, match="digest"):
            await made.load_weights(replace(snapshot, digest="another"), "boundary")

    channel = WeightChannel(keep=2)
    try:
        during(scenario)
    finally:
        channel.close()


def test_what_the_engine_raises_is_raised_here() -> None:
    async def scenario(made: ProcessEngine) -> None:
        with pytest.raises(PromptTooLong):
            await made.generate(replace(request(), prompt_ids=np.ones(70, np.int32)))

    during(scenario)


def test_an_error_that_is_none_of_ours_is_that_of_one_completion() -> None:
    async def whole() -> None:
        config = resolve(TINY, ["rollout.engine=tests.failing_engine:FailsForOne"])
        made = ProcessEngine(config, resolve_model("tiny"), FakeRollout.capabilities)
        await made.start()
        with pytest.raises(RuntimeError, match="ValueError: not this one"):
            await made.generate(request("bad"))
        assert len((await made.generate(request("good"))).token_ids)
        await made.stop()

    asyncio.run(asyncio.wait_for(whole(), SOON))


def test_an_engine_that_cannot_start_says_why() -> None:
    async def whole() -> None:
        config = resolve(TINY, ["rollout.engine=tests.failing_engine:DoesNotStart"])
        made = ProcessEngine(config, resolve_model("tiny"), FakeRollout.capabilities)
        with pytest.raises(EngineError, match="on fire"):
            await made.start()
        await made.stop()

    asyncio.run(asyncio.wait_for(whole(), SOON))


def test_a_completion_that_is_cancelled_leaves_the_engine() -> None:
    async def scenario(made: ProcessEngine) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(made.generate(request()), 0.2)
        began = time.monotonic()
        await made.stop()  # it would wait for what runs
        assert time.monotonic() - began < SOON / 2

    during(scenario, token_latency=1000.0)


def test_when_the_child_dies_everybody_is_told() -> None:
    async def scenario(made: ProcessEngine) -> None:
        waiting = asyncio.create_task(made.generate(request()))
        await asyncio.sleep(0)  # it is sent
        child(made).kill()
        with pytest.raises(EngineError, match="has ended"):
            await waiting
        with pytest.raises(EngineError, match="has ended"):
            await made.generate(request())

    during(scenario, token_latency=1000.0)


def test_a_child_does_not_outlive_the_process_that_started_it() -> None:
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.test_process_engine import child, engine

async def hang():
    made = engine(token_latency=1000.0)
    await made.start()
    print(child(made).pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(hang())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    process = psutil.Process(int(parent.stdout.readline()))

    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate(timeout=SOON)

    process.wait(timeout=SOON)
