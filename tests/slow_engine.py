"""A fake engine that takes its time to start, named in the configuration as users name theirs."""

from __future__ import annotations

import asyncio

from asyncflow.engines.fake import FakeRollout


class SlowToStart(FakeRollout):
    """Ready after two seconds."""

    async def start(self) -> None:
        await asyncio.sleep(2)
        await super().start()
