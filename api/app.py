"""The application that serves runs over HTTP. It says that it is alive; jobs and the dashboard come later."""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel


class Health(BaseModel):
    """That the service answers, and what it is."""

    status: Literal["ok"]
    version: str


def create_app() -> FastAPI:
    """A new application; nothing is shared between two of them, and nothing is started."""
    release = version("asyncflow")
    # The interactive pages load scripts from another site: what is served here works without a network.
    app = FastAPI(title="AsyncFlow", version=release, docs_url=None, redoc_url=None)

    @app.get("/healthz")
    async def healthz() -> Health:
        return Health(status="ok", version=release)

    return app
