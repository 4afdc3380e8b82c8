"""Completions of the policy that a run serves now, in the shape of OpenAI's `POST /v1/completions`."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Final

from asyncflow_api.dependencies import Submits
from asyncflow_api.problems import Problem
from asyncflow_api.refusals import RunRoute
from asyncflow_api.runs import RunView, TheRuns
from asyncflow_api.schemas_run import Choice, ChoiceLogprobs, CompletionReply, CompletionRequest, Usage
from fastapi import APIRouter, Header, Query, Request

router = APIRouter(tags=["completions"], route_class=RunRoute)

MOST_WAITING: Final = 16
"""Requests that may wait at the same time: each has a thread."""

_waiting = threading.BoundedSemaphore(MOST_WAITING)


@router.post("/v1/completions", summary="Complete text with a run's current policy")
def completions(
    asked: CompletionRequest,
    request: Request,
    runs: TheRuns,
    _: Submits,
    job: Annotated[str | None, Query(max_length=100)] = None,
    x_asyncflow_job: Annotated[str | None, Header(max_length=100)] = None,
) -> CompletionReply:
    """`model` is the id of a job, if neither the query nor the header `X-AsyncFlow-Job` names one. The engine generates
    it beside the rollouts; nothing of it goes into the queue. `system_fingerprint` names the policy versions."""
    view = runs.view(request.app.state.jobs.run_dir(job or x_asyncflow_job or asked.model))
    view.check_live()
    prompts: list[Any] = _prompts(asked)
    if len(prompts) * asked.n > 32:
        text = f"{len(prompts)} prompts with {asked.n} completions each are more than 32: ask for fewer"
        raise Problem(422, "invalid_request", text, field="body.n")
    if not _waiting.acquire(blocking=False):
        text = f"{MOST_WAITING} requests wait for completions already: try again"
        raise Problem(429, "too_many_waiting", text, headers={"Retry-After": "1"})
    try:
        made = [_complete(view, prompt, asked) for prompt in prompts]
    finally:
        _waiting.release()
    found = [completion for one in made for completion in one["completions"]]
    given = sum(len(one["prompt_ids"]) for one in made)
    sampled = sum(len(completion["token_ids"]) for completion in found)
    versions = sorted({version for completion in found for version in completion["versions"]})
    return CompletionReply(
        id=f"cmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=asked.model,
        choices=[_choice(view, asked, index, completion) for index, completion in enumerate(found)],
        usage=Usage(prompt_tokens=given, completion_tokens=sampled, total_tokens=given + sampled),
        system_fingerprint=",".join(versions),
    )


def _prompts(asked: CompletionRequest) -> list[Any]:
    prompt = asked.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _complete(view: RunView, prompt: str | Sequence[int], asked: CompletionRequest) -> Mapping[str, Any]:
    made: Mapping[str, Any] = view.control.complete(
        prompt,
        n=asked.n,
        max_new_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=asked.seed,
        timeout=asked.timeout_seconds,
    )
    return made


def _choice(view: RunView, asked: CompletionRequest, index: int, completion: Mapping[str, Any]) -> Choice:
    logprobs = None
    if asked.logprobs is not None:
        texts = [text or "" for text in view.samples.texts(completion["token_ids"])]
        offsets = list(accumulate(map(len, texts), initial=0))[:-1]
        logprobs = ChoiceLogprobs(tokens=texts, token_logprobs=completion["logprobs"], text_offset=offsets)
    return Choice(text=completion["text"], index=index, logprobs=logprobs, finish_reason=completion["finish_reason"])
