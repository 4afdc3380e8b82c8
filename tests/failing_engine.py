"""A fake engine that cannot start, named in the configuration as users name theirs."""

from __future__ import annotations

from asyncflow.engines.base import GenerationRequest
from asyncflow.engines.fake import FakeRollout
from asyncflow.errors import EngineError
from asyncflow.types import Completion


class FailsForOne(FakeRollout):
    """Cannot complete the request `bad`."""

    async def generate(self, request: GenerationRequest) -> Completion:
        if request.request_id == "bad":
            raise ValueError("not this one")
        return await super().generate(request)


class DoesNotStart(FakeRollout):
    """Fails."""

    async def start(self) -> None:
        raise EngineError("the accelerator is on fire")
