"""The dashboard: the page at `/` and its files under `/static/`.

Nothing here needs a token: the files are the same for everybody and hold no data. What they show comes from `/v1`,
which asks for one. They are read once, when the application is made, so that a request can name no other file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

STATIC = Path(__file__).parent.parent / "static"

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""What is served, by its ending. Licences and notes beside the vendored code are not."""

HEADERS = {
    # Everything comes from this origin, nothing is inline, and no script can turn a string into markup or code: what a
    # model has written is shown as text, whatever it is.
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # The ETag makes asking again cheap, and an upgraded service never runs with files of the one before.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, kw_only=True)
class StaticFile:
    """One file as it is sent."""

    body: bytes
    media_type: str
    etag: str


def read_static(folder: Path = STATIC) -> dict[str, StaticFile]:
    """Path below the folder, with slashes → the file. Raises OSError when the installation is not complete."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (media_type := MEDIA_TYPES.get(path.suffix)):
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            files[path.relative_to(folder).as_posix()] = StaticFile(body=body, media_type=media_type, etag=etag)
    return files


def make_router(folder: Path = STATIC) -> APIRouter:
    """Routes for the page and its files."""
    files = read_static(folder)
    router = APIRouter(include_in_schema=False)

    def send(request: Request, name: str) -> Response:
        file = files.get(name)
        if file is None:
            raise HTTPException(404, headers=HEADERS)
        headers = {**HEADERS, "ETag": file.etag}
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.body, 200, headers, file.media_type)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return send(request, "index.html")

    @router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
    async def static(request: Request, name: str) -> Response:
        return send(request, name)

    return router


router = make_router()
