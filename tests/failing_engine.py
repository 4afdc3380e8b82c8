"""A fake engine that cannot start, named in the configuration as users name theirs."""

from __future__ import annotations

from asyncflow.engines.fake import FakeRollout
from asyncflow.errors import EngineError


class DoesNotStart(FakeRollout):
    """Fails."""

    async def start(self) -> None:
        raise EngineError("the accelerator is on fire")
