"""The service itself: whether it lives, who calls, and who may."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

from asyncflow_api.auth import COOKIE, Identity, identity_of
from asyncflow_api.dependencies import Administers, Reads, TheJobs, TheTokens
from asyncflow_api.pages import CursorText, Limit, Page, number, page_of
from asyncflow_api.problems import Problem
from asyncflow_api.schemas import Health, Login, MadeToken, Me, NewToken, Token, token_body, when
from fastapi import APIRouter, Depends, Path, Request, Response

router = APIRouter(tags=["service"])


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the service answers. Needs no token."""
    return Health(version=version("asyncflow"))


@router.post("/v1/login")
def login(body: Login, response: Response, jobs: TheJobs, tokens: TheTokens) -> Me:
    """A session for a browser, in a cookie that its scripts cannot read."""
    found = tokens.log_in(body.token, jobs.settings.session_seconds)
    if found is None:
        text = "this token is not known or has expired: take a valid one"
        raise Problem(401, "wrong_token", text, field="body.token", headers={"WWW-Authenticate": "Bearer"})
    identity, session = found
    response.set_cookie(
        COOKIE,
        session,
        max_age=int(jobs.settings.session_seconds),
        httponly=True,
        samesite="strict",
        secure=jobs.settings.tls,
        path="/",
    )
    return _me(identity)


@router.post("/v1/logout", status_code=204)
def logout(request: Request, response: Response, tokens: TheTokens, _: Reads) -> None:
    """End the session of this browser."""
    if session := request.cookies.get(COOKIE):
        tokens.log_out(session)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")


@router.get("/v1/me")
def me(identity: Annotated[Identity, Depends(identity_of)], _: Reads) -> Me:
    """Who calls, and what they may."""
    return _me(identity)


@router.post("/v1/tokens", status_code=201)
def make_token(body: NewToken, tokens: TheTokens, _: Administers) -> MadeToken:
    """A new token, which is shown this once."""
    row, token = tokens.make(body.name, body.scope, body.expires_in)
    return MadeToken(**token_body(row).model_dump(), token=token)


@router.get("/v1/tokens")
def list_tokens(tokens: TheTokens, _: Administers, cursor: CursorText = None, limit: Limit = 20) -> Page[Token]:
    """Every token that was made and not removed."""
    begin = number("tokens", cursor) or 0
    rows = tokens.all()[begin : begin + limit + 1]
    after = [str(begin + place + 1) for place in range(len(rows))]
    return page_of("tokens", [token_body(row) for row in rows], limit, after)


@router.delete("/v1/tokens/{token_id}", status_code=204)
def remove_token(token_id: Annotated[str, Path(max_length=64)], tokens: TheTokens, _: Administers) -> None:
    """Take a token back, with its sessions."""
    if not tokens.remove(token_id):
        raise Problem(404, "no_such_token", "there is no such token: GET /v1/tokens lists them")


def _me(identity: Identity) -> Me:
    return Me(name=identity.name, scope=identity.scope, expires_at=when(identity.expires_at), session=identity.session)
