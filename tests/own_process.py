"""Fake engines that want a process of their own, named in the configuration as users name theirs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from asyncflow.engines.base import GenerationRequest
from asyncflow.engines.fake import FakeRollout
from asyncflow.errors import EngineError
from asyncflow.types import Completion

OWN = "rollout.engine=tests.own_process:InOwnProcess"


class InOwnProcess(FakeRollout):
    """As vLLM in that, and else the fake engine."""

    capabilities = replace(FakeRollout.capabilities, own_process=True)


class FailsForOne(InOwnProcess):
    """Cannot complete the request `bad`."""

    async def generate(self, request: GenerationRequest) -> Completion:
        if request.request_id == "bad":
            raise ValueError("not this one")
        return await super().generate(request)


class DoesNotStart(InOwnProcess):
    """Fails."""

    async def start(self) -> None:
        raise EngineError("the accelerator is on fire")


class Fails(InOwnProcess):
    """Cannot go on when it gets to sample 40."""

    async def generate(self, request: GenerationRequest) -> Completion:
        if request.request_id == "40.1":
            raise EngineError("out of memory")
        return await super().generate(request)


class HangsOnce(InOwnProcess):
    """Never ends the first attempt at sample 5."""

    async def generate(self, request: GenerationRequest) -> Completion:
        if request.request_id == "5.1":
            await asyncio.Event().wait()
        return await super().generate(request)
