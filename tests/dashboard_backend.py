"""A service with the routes that the dashboard uses, over runs that exist only in memory and move.

For the browser tests of the page itself, and to work on it without training anything:

    python -m tests.dashboard_backend [PORT]     # the token is `admin-token`; `read-token` may only read
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from asyncflow_api.routes.dashboard import make_router
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from tests.dashboard_run import BATCH, TICK, Json, MovingRun, rfc3339

TOKENS = {"admin-token": "admin", "read-token": "read"}
SESSION = "asyncflow_session"
OVER = ""
"""In place of an event: the stream is over."""
ENDED = ("succeeded", "failed", "cancelled")
CONFIG: Json = {
    "name": "sums-grpo", "model": "smollm2-135m", "data": {"train": "reasoning_gym:chain_sum", "eval_size": 200},
    "reward": "last_number", "algorithm": "grpo", "num_generations": 8, "train_batch_size": BATCH, "max_new_tokens": 96,
    "learning_rate": 1e-5, "kl_coef": 0.01, "steps": 200, "max_staleness": 2, "late_samples": "wait",
    "weights": {"update": "in_flight"}, "rollout": {"engine": "vllm", "max_concurrency": 64},
    "learner": {"engine": "torch"},
}  # fmt: skip


class Refusal(Exception):
    def __init__(self, status: int, code: str, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.status, self.body = (
            status,
            {"type": "about:blank", "title": code, "status": status, "code": code, "detail": detail, **more},
        )


class Backend:
    """The jobs, and who is told when something changes. All methods may be called from any thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.jobs: dict[str, Json] = {}
        self.runs: dict[str, MovingRun] = {}
        self.told: dict[str, list[Json]] = {}
        """Job → its events, in the order in which they became known."""
        self.taken_in: dict[str, int] = {}
        """Job → how many of its run's events are among them."""
        self.refusing = False
        """Answers nothing but 503, and ends all streams: a service that is gone."""
        self.closing = False
        self.tokens: dict[str, Json] = {}
        self.make_token({"name": "first", "scope": "admin"})
        self.make_token({"name": "notebook", "scope": "read", "expires_in": 86400 * 30})
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._fill()

    def _fill(self) -> None:
        now = time.time()
        self.add(
            "sums-grpo", "running", labels={"team": "maths"}, run=MovingRun(tick=94 * 12, steps=200, bound=2, now=now)
        )
        self.add(
            "sums-long",
            "running",
            labels={"team": "maths", "try": "3"},
            run=MovingRun(tick=31 * 12, steps=400, bound=1, now=now),
        )
        self.add("sums-synchronous", "paused", run=MovingRun(tick=12 * 12 + 5, steps=100, bound=0, now=now))
        self.add("judge-ablation", "queued", priority=80)
        self.add("nightly", "queued")
        self.add(
            "baseline",
            "succeeded",
            run=MovingRun(tick=40 * 12, steps=40, bound=1, now=now - 7000),
            summary={"accuracy_before": 0.185, "accuracy_after": 0.61},
        )
        killed = (
            "The process was killed (signal 9) in step 4: more memory was used than there is. It can be resumed from "
            "its checkpoint of step 3."
        )
        run = MovingRun(tick=3 * 12, steps=40, bound=1, now=now - 9000)
        self.add("too-large", "failed", run=run, reason={"code": "killed", "message": killed})
        unknown = "model: there is no folder or short name smollm3-135m."
        self.add("wrong-model", "failed", reason={"code": "invalid", "message": unknown})

    def add(self, name: str, state: str, *, run: MovingRun | None = None, **more: Any) -> Json:
        with self.lock:
            now, number = time.time(), len(self.jobs) + 1
            job_id = f"job_{number:04d}"
            began = run.began if run else now - 60 * number
            config = {
                **CONFIG,
                "name": name,
                **({"max_staleness": run.bound, "steps": run.steps} if run else {}),
                **more.pop("config", {}),
            }
            job = {
                "id": job_id,
                "object": "job",
                "name": name,
                "state": state,
                "reason": None,
                "priority": 50,
                "labels": {},
                "resume_from": None,
                "created_at": rfc3339(began - 4),
                "started_at": rfc3339(began) if run else None,
                "finished_at": rfc3339(run.at(run.tick) if run else now - 600) if state in ENDED else None,
                "updated_at": rfc3339(now),
                "revision": 1,
                "run_dir": f"/var/lib/asyncflow/jobs/{job_id}/run",
                "config": config,
                "starts": 1 if run else 0,
                "max_staleness": config["max_staleness"],
                "summary": None,
                **more,
            }
            self.jobs[job_id] = job
            self.told[job_id] = []
            self.taken_in[job_id] = 0
            if run:
                self.runs[job_id] = run
                self.take_in(job_id)
            self.tell(job_id, "state", f"The job is {state}.", {"state": state})
        self.wake()
        return self.shown(job_id)

    def shown(self, job_id: str) -> Json:
        run = self.runs.get(job_id)
        return {**self.jobs[job_id], "progress": run.progress() if run else None}

    def listed(self, job_id: str) -> Json:
        """As lists have it."""
        return {name: value for name, value in self.shown(job_id).items() if name not in ("config", "summary")}

    def change(self, job_id: str, **values: Any) -> Json:
        """Set fields of a job and tell everybody."""
        with self.lock:
            job = self.jobs[job_id]
            job.update(values, revision=job["revision"] + 1, updated_at=rfc3339(time.time()))
            if "max_staleness" in values:
                if run := self.runs.get(job_id):
                    run.set_bound(values["max_staleness"])
                self.tell(job_id, "set", f"max_staleness is {values['max_staleness']} from now on.", values)
            if "state" in values:
                self.tell(job_id, "state", f"The job is {values['state']}.", {"state": values["state"]})
        self.wake()
        return self.shown(job_id)

    def make_token(self, body: Json) -> Json:
        now, number = time.time(), len(self.tokens) + 1
        until = now + body["expires_in"] if "expires_in" in body else None
        self.tokens[f"tok_{number}"] = token = {
            "id": f"tok_{number}",
            "object": "token",
            "name": body["name"],
            "scope": body["scope"],
            "created_at": rfc3339(now),
            "expires_at": until and rfc3339(until),
        }
        return token

    def forget(self, job_id: str) -> None:
        with self.lock:
            for known in (self.jobs, self.told, self.taken_in, self.runs):
                known.pop(job_id, None)
        self.wake()

    def tell(
        self, job_id: str, kind: str, message: str, data: Json, level: str = "info", at: float | None = None
    ) -> None:
        """An event of the service, or of the run where `at` says when it was."""
        told, taken = self.told[job_id], self.taken_in[job_id]
        told.append(
            {
                "id": f"{len(told) + 1 - taken}.{taken}",
                "object": "event",
                "job_id": job_id,
                "created_at": rfc3339(at or time.time()),
                "type": kind,
                "level": level,
                "message": message,
                "data": data,
            }
        )

    def take_in(self, job_id: str) -> None:
        """Tell what the run has written meanwhile."""
        run = self.runs[job_id]
        for tick, kind, level, message, data in run.events()[self.taken_in[job_id] :]:
            self.taken_in[job_id] += 1
            self.tell(job_id, kind, message, data, level, at=run.at(tick))

    def tick(self) -> None:
        """Everything moves on by a quarter of a second of the run."""
        with self.lock:
            for job_id, job in self.jobs.items():
                run, state = self.runs.get(job_id), job["state"]
                after = {
                    "cancelling": "cancelled",
                    "pausing": "paused",
                    "resuming": "running",
                    "starting": "running",
                }.get(state)
                if after:
                    ended = {"finished_at": rfc3339(time.time())} if after in ENDED else {}
                    self.change(job_id, state=after, **ended)
                elif state == "running" and run:
                    if run.ended:
                        self.change(job_id, state="succeeded", finished_at=rfc3339(time.time()))
                    else:
                        run.tick += 1
                        self.take_in(job_id)
        self.wake()

    # -- streams -------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        for loop, event in list(self._waiters):
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(event.set)

    def refuse(self, refusing: bool) -> None:
        self.refusing = refusing
        self.wake()

    async def stream(self, new: Callable[[], Iterator[str]]) -> AsyncIterator[str]:
        """Whatever `new` gives, each time that something has changed."""
        changed = asyncio.Event()
        waiter = (asyncio.get_running_loop(), changed)
        self._waiters.add(waiter)
        try:
            yield ": here\n\n"
            while not (self.refusing or self.closing):
                changed.clear()
                with self.lock:
                    lines = list(new())
                for line in lines:
                    if line == OVER:
                        return
                    yield line
                await changed.wait()
        finally:
            self._waiters.discard(waiter)


def sse(event: str, data: Any, event_id: str | None = None) -> str:
    return f"{f'id: {event_id}{chr(10)}' if event_id else ''}event: {event}\ndata: {json.dumps(data)}\n\n"


def page(data: list[Any], limit: int, cursor: str | None) -> Json:
    start = int(cursor or 0)
    end = start + limit
    more = end < len(data)
    return {"object": "list", "data": data[start:end], "has_more": more, "next_cursor": str(end) if more else None}


def create_app(backend: Backend) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(make_router())
    app.include_router(_routes(backend))

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body, refusal.status, media_type="application/problem+json")

    @app.middleware("http")
    async def guard(request: Request, forward: Any) -> Response:
        path = request.url.path
        try:
            if backend.refusing and path.startswith(("/v1", "/healthz")):
                raise Refusal(503, "unavailable", "The service is being restarted.")
            if path.startswith("/v1") and path != "/v1/login":
                bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
                scope = TOKENS.get(bearer or request.cookies.get(SESSION, ""))
                if scope is None:
                    raise Refusal(401, "unauthenticated", "Log in, or send a token.")
                if request.method != "GET" and not bearer and request.headers.get("x-csrf") != "1":
                    raise Refusal(403, "csrf", "A change with a cookie needs the header X-CSRF.")
                if request.method != "GET" and scope == "read" and path != "/v1/logout":
                    raise Refusal(403, "forbidden", "This token may only read.")
                request.state.scope = scope
        except Refusal as refusal:
            return JSONResponse(refusal.body, refusal.status, media_type="application/problem+json")
        response: Response = await forward(request)
        return response

    return app


def _routes(backend: Backend) -> APIRouter:
    routes = APIRouter()

    def job_of(job_id: str) -> Json:
        if job_id not in backend.jobs:
            raise Refusal(404, "not_found", f"There is no job {job_id}.")
        return backend.jobs[job_id]

    def run_of(job_id: str) -> MovingRun:
        job_of(job_id)
        if job_id not in backend.runs:
            raise Refusal(409, "not_started", "The run of this job has not begun.")
        return backend.runs[job_id]

    def answer_stream(new: Callable[[], Iterator[str]]) -> StreamingResponse:
        return StreamingResponse(
            backend.stream(new), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    @routes.get("/healthz")
    async def healthz() -> Json:
        return {"status": "ok"}

    @routes.post("/v1/login")
    async def login(request: Request) -> Response:
        token = (await request.json()).get("token", "")
        if token not in TOKENS:
            raise Refusal(401, "unauthenticated", "This token is not known.")
        response = Response(status_code=204)
        response.set_cookie(SESSION, token, httponly=True, samesite="strict")
        return response

    @routes.post("/v1/logout")
    async def logout() -> Response:
        response = Response(status_code=204)
        response.delete_cookie(SESSION)
        return response

    @routes.get("/v1/me")
    async def me(request: Request) -> Json:
        return {"object": "token", "scope": request.state.scope}

    @routes.get("/v1/jobs")
    async def jobs(limit: int = 20, cursor: str | None = None) -> Json:
        return page([backend.listed(job_id) for job_id in reversed(backend.jobs)], limit, cursor)

    @routes.get("/v1/events")
    async def fleet() -> Response:
        seen = {job_id: job["revision"] for job_id, job in backend.jobs.items()}

        def new() -> Iterator[str]:
            for job_id in [one for one in seen if one not in backend.jobs]:
                seen.pop(job_id)
                yield sse("deleted", {"id": job_id})
            for job_id, job in backend.jobs.items():
                if seen.get(job_id) != job["revision"]:
                    seen[job_id] = job["revision"]
                    yield sse("job", backend.listed(job_id), str(job["revision"]))

        return answer_stream(new)

    @routes.post("/v1/jobs", status_code=201)
    async def submit(request: Request) -> Json:
        body = await request.json()
        before = backend.jobs[body["resume_from"]]["config"] if "resume_from" in body else {}
        config = before | body["config"]
        if errors := wrong(config):
            raise Refusal(422, "invalid_config", "The configuration is not valid.", errors=errors)
        run = MovingRun(tick=0, steps=config.get("steps", 10), bound=config.get("max_staleness", 1), now=time.time())
        more = {key: body[key] for key in ("priority", "labels", "resume_from") if key in body}
        return backend.add(
            body.get("name") or config.get("name", "job"), "starting", run=run, config=config, **more
        ) | {"progress": None}

    @routes.post("/v1/jobs:validate")
    async def validate(request: Request) -> Json:
        body = await request.json()
        if set(body) != {"config"}:
            raise Refusal(422, "invalid", "Send config and nothing else.")
        config = body["config"]
        errors = wrong(config)
        plan = {
            "a step": f"{config.get('train_batch_size')} samples of {config.get('num_generations')} a prompt",
            "runs": f"{config.get('steps')} steps; the engines are fakes, in this process",
            "bound": "a token is at most 1 policy version old when it is trained",
        }
        return {"object": "validation", "ok": not errors, "errors": errors, "config": config, "plan": plan}

    @routes.get("/v1/jobs/{job_id}")
    async def job(job_id: str) -> Json:
        job_of(job_id)
        return backend.shown(job_id)

    @routes.delete("/v1/jobs/{job_id}")
    async def delete(job_id: str) -> Json:
        if job_of(job_id)["state"] not in ENDED:
            raise Refusal(409, "not_ended", "The job is running: cancel it first.")
        backend.forget(job_id)
        return {"id": job_id, "object": "job", "deleted": True}

    @routes.get("/v1/tokens")
    async def tokens(limit: int = 20, cursor: str | None = None) -> Json:
        return page(list(backend.tokens.values()), limit, cursor)

    @routes.post("/v1/tokens", status_code=201)
    async def make_token(request: Request) -> Json:
        return backend.make_token(await request.json()) | {"token": "af_" + "x" * 43}

    @routes.delete("/v1/tokens/{token_id}")
    async def revoke(token_id: str) -> Response:
        if backend.tokens.pop(token_id, None) is None:
            raise Refusal(404, "no_such_token", "There is no such token.")
        return Response(status_code=204)

    @routes.patch("/v1/jobs/{job_id}")
    async def amend(job_id: str, request: Request) -> Json:
        match = request.headers.get("if-match")
        if match and match != f'"{job_of(job_id)["revision"]}"':
            raise Refusal(412, "changed", "The job has changed since it was read.")
        body = await request.json()
        bound = body.get("max_staleness")
        if bound is not None and not 0 <= bound <= 16:
            raise Refusal(422, "invalid", f"max_staleness cannot be {bound}: give 0 to 16.", field="max_staleness")
        return backend.change(job_id, **body)

    @routes.post("/v1/jobs/{job_id}/{action}", status_code=202)
    async def act(job_id: str, action: str) -> Json:
        job_of(job_id)
        state = {"pause": "pausing", "resume": "resuming", "cancel": "cancelling"}.get(action)
        if state is None:
            raise Refusal(404, "not_found", "There is no such route.")
        return backend.change(job_id, state=state)

    @routes.get("/v1/jobs/{job_id}/events")
    async def events(job_id: str, request: Request, limit: int = 20, cursor: str | None = None, tail: int = 0) -> Any:
        job_of(job_id)
        if "text/event-stream" not in request.headers.get("accept", ""):
            return page(backend.told[job_id], limit, cursor)
        last = request.headers.get("last-event-id", cursor)
        ids = [event["id"] for event in backend.told[job_id]]
        told = [ids.index(last) + 1 if last in ids else max(0, len(ids) - tail) if tail else 0]

        def new() -> Iterator[str]:
            for event in backend.told[job_id][told[0] :]:
                told[0] += 1
                yield sse(event["type"], event, event["id"])
            if backend.jobs[job_id]["state"] in ENDED:
                yield sse("end", {"job_id": job_id})
                yield OVER

        return answer_stream(new)

    @routes.get("/v1/jobs/{job_id}/live")
    async def live(job_id: str) -> Response:
        run, last = run_of(job_id), [""]

        def new() -> Iterator[str]:
            state = run.live()
            state["queue"].pop("history")
            text = sse("live", state)
            if text != last[0]:
                last[0] = text
                yield text
            if backend.jobs[job_id]["state"] in ENDED:
                yield sse("end", {"object": "end"})
                yield OVER

        return answer_stream(new)

    @routes.get("/v1/jobs/{job_id}/queue")
    async def queue(job_id: str) -> Json:
        return run_of(job_id).queue()

    @routes.get("/v1/jobs/{job_id}/workers")
    async def workers(job_id: str) -> Json:
        return page(run_of(job_id).workers(), 100, None)

    @routes.post("/v1/jobs/{job_id}/workers/{worker}/{action}", status_code=202)
    async def drain(job_id: str, worker: str, action: str) -> Json:
        drained = run_of(job_id).drained
        (drained.add if action == "drain" else drained.discard)(worker)
        backend.wake()
        return {"object": "worker", "name": worker, "drained": worker in drained}

    @routes.get("/v1/jobs/{job_id}/timeline")
    async def timeline(job_id: str, seconds: float = 60) -> Json:
        return run_of(job_id).timeline(seconds)

    @routes.get("/v1/jobs/{job_id}/engines")
    async def engines(job_id: str) -> Json:
        return page(run_of(job_id).engines(), 100, None)

    @routes.get("/v1/jobs/{job_id}/metrics")
    async def metrics(job_id: str, since_step: int = -1, names: str = "", points: int = 1_000_000) -> Json:
        return run_of(job_id).metrics(since_step, names.split(",") if names else None, points)

    @routes.get("/v1/jobs/{job_id}/checkpoints")
    async def checkpoints(job_id: str) -> Json:
        job_of(job_id)
        step = backend.runs[job_id].step // 20 * 20 if job_id in backend.runs else 0
        return page(
            [{"step": step, "policy_version": f"0.{step}", "bytes": 1_620_000_000, "created_at": rfc3339(time.time())}]
            if step
            else [],
            20,
            None,
        )

    @routes.get("/v1/jobs/{job_id}/logs")
    async def logs(job_id: str) -> Response:
        job_of(job_id)
        lines = [f"{event['created_at']} {event['message']}" for event in backend.told[job_id][-300:]]
        return Response("\n".join(lines) + "\n", media_type="text/plain")

    @routes.get("/v1/jobs/{job_id}/samples")
    async def samples(
        job_id: str, q: str = "", state: str = "", group_id: int | None = None, step: int | None = None,
        min_reward: float | None = None, max_reward: float | None = None, limit: int = 20, cursor: str | None = None,
    ) -> Json:  # fmt: skip
        found = [
            {**sample, "response": sample["response"][:200]}
            for sample in run_of(job_id).samples()
            if (not state or sample["state"] == state)
            and (group_id is None or sample["group_id"] == group_id)
            and (step is None or sample["step"] == step)
            and (min_reward is None or (sample["reward"] is not None and sample["reward"] >= min_reward))
            and (max_reward is None or (sample["reward"] is not None and sample["reward"] <= max_reward))
            and q.lower() in (sample["prompt"] + sample["response"]).lower()
        ]
        return page(found, limit, cursor)

    @routes.get("/v1/jobs/{job_id}/samples/{number}")
    async def sample(job_id: str, number: int) -> Json:
        run = run_of(job_id)
        if not 1 <= number <= (run.step + 3) * BATCH:
            raise Refusal(404, "not_found", f"There is no sample {number}.")
        return run.sample(number)

    return routes


def wrong(config: Json) -> list[Json]:
    known = {*CONFIG, "eval_every"}
    errors = [
        {"field": key, "message": "is not a setting: look at asyncflow/config.py for all of them."}
        for key in config
        if key not in known
    ]
    if "model" not in config:
        errors.append({"field": "model", "message": "is missing: name a folder, a Hub id or a short name."})
    return errors


@contextlib.contextmanager
def serving(backend: Backend, *, port: int = 0, moving: bool = True) -> Iterator[str]:
    """The address at which it is served, and moves, until the block ends."""
    server = uvicorn.Server(
        uvicorn.Config(create_app(backend), port=port, log_level="error", timeout_graceful_shutdown=5)
    )
    socket = server.config.bind_socket()
    over = threading.Event()

    def move() -> None:
        while not over.wait(TICK):
            backend.tick()

    threads = [threading.Thread(target=server.run, kwargs={"sockets": [socket]}, name="service")]
    threads += [threading.Thread(target=move, name="runs")] if moving else []
    for thread in threads:
        thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        over.set()
        backend.closing = server.should_exit = True
        backend.wake()
        for thread in threads:
            thread.join()
        socket.close()


if __name__ == "__main__":
    with serving(Backend(), port=int(sys.argv[1]) if len(sys.argv) > 1 else 8765) as url:
        print(f"{url} (token: admin-token)")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
