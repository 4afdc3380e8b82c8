"""What can be asked of the service, a method each."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

from asyncflow.client import login
from asyncflow.client.connection import Connection
from asyncflow.client.models import (
    ENDED,
    AccessToken,
    Checkpoint,
    Engine,
    Event,
    Identity,
    Job,
    JobChange,
    Metrics,
    NewAccessToken,
    Page,
    Queue,
    Sample,
    SampleBrief,
    Span,
    Timeline,
    Validation,
    Worker,
)
from asyncflow.client.streams import follow
from asyncflow.errors import ServiceError, UserError

CHANGED: Final = "job"
DELETED: Final = "deleted"
JOB_ID: Final = re.compile(r"job_[0-9A-Za-z_-]{1,64}")
TOKEN_ID: Final = re.compile(r"tok_[0-9A-Za-z_-]{1,60}")
MOST_IN_PAGE: Final = 100
LOOK_EVERY: Final = 2.0
"""Seconds between two looks at a job that is waited for, at most."""
PLANNED_WITHIN: Final = 150.0
"""Seconds; the service itself gives up after 120."""

Item = TypeVar("Item")


class Client:
    """A service. Threads may share one.

    Every method raises ServiceError for what the service refuses, and ServiceUnreachable where it does not answer.
    """

    def __init__(
        self, url: str, token: str, *, timeout: float = 30.0, patience: float = 15.0, tls_root: str | None = None
    ) -> None:
        """`timeout`: seconds for one call with its repeats, and for the silence of a stream. `patience`: seconds for
        which a service that is not there is tried again. `tls_root`: file (PEM) of who signed its certificate.

        Raises UserError for an address, token or file that cannot be one.
        """
        self._connection = Connection(url, token, timeout=timeout, patience=patience, tls_root=tls_root)

    @classmethod
    def from_login(cls, *, timeout: float = 30.0, patience: float = 15.0) -> Self:
        """For the service that `asyncflow login` was called for. Raises UserError where it was not."""
        found = login.load()
        return cls(found.url, found.token, timeout=timeout, patience=patience, tls_root=found.tls_root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections. May be called twice."""
        self._connection.close()

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._connection.url

    def me(self) -> Identity:
        """Who calls, and what they may."""
        return self._connection.get(Identity, "/v1/me")

    # -- tokens --------------------------------------------------------------------------------------------------------

    def tokens(self) -> Iterator[AccessToken]:
        """Every token that holds or has expired, the oldest first. Needs the scope `admin`, as do the next two."""
        return self._pages(Page[AccessToken], "/v1/tokens", {})

    def make_token(self, name: str, scope: str, *, expires_in: int | None = None) -> NewAccessToken:
        """A new token of the scope `read`, `submit` or `admin`, which holds for `expires_in` seconds, or for ever.

        It is not repeated once it may have arrived, as there would be two then.
        """
        body = {"name": name, "scope": scope, "expires_in": expires_in}
        return self._connection.decode(
            NewAccessToken, self._connection.call("POST", "/v1/tokens", body=body, repeat=False)
        )

    def revoke_token(self, token_id: str) -> None:
        """Take a token back, with the sessions of browsers that it began. Not repeated once it may have arrived."""
        if TOKEN_ID.fullmatch(token_id) is None:
            raise UserError(f"{token_id!r} is not the id of a token: `asyncflow token list` shows them")
        self._connection.call("DELETE", f"/v1/tokens/{token_id}", repeat=False)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def validate(self, config: Mapping[str, Any], *, timeout: float = PLANNED_WITHIN) -> Validation:
        """What is wrong with a configuration, or what its run would need. Starts nothing.

        `timeout`: seconds; for a model that is not there yet it takes minutes.
        """
        body = {"config": dict(config)}
        answer = self._connection.call("POST", "/v1/jobs:validate", body=body, timeout=timeout)
        return self._connection.decode(Validation, answer)

    def submit(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        priority: int = 50,
        labels: Mapping[str, str] | None = None,
        resume_from: str | None = None,
        key: str | None = None,
    ) -> Job:
        """Give the service a job: a configuration as in a file, or what changes in that of the job `resume_from`.

        `priority`: 0 to 100, the highest starts first. `key`: the same key and job are one job, however often they are
        submitted. Where it is left out one is made for this call, so that its repeats make no second job.
        """
        body: dict[str, Any] = {"config": dict(config or {}), "priority": priority, "labels": dict(labels or {})}
        body |= {name: value for name, value in (("name", name), ("resume_from", resume_from)) if value is not None}
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        answer = self._connection.call("POST", "/v1/jobs", body=body, headers=headers)
        return self._connection.decode(Job, answer)

    def jobs(self, *, states: Sequence[str] = (), labels: Sequence[str] = ()) -> Iterator[Job]:
        """Jobs, the newest first, without `config` and `summary`: in one of the states, with all labels (`name=value`,
        or `name`)."""
        return self._pages(Page[Job], "/v1/jobs", {"state": list(states), "label": list(labels)})

    def follow_jobs(self, *, after: str | None = None) -> Iterator[JobChange]:
        """What changes in any of the jobs from now on (or after the change of an id), without an end.

        Goes on over disconnects and restarts of the service. Several changes of one job may be told as one.
        """
        for message in follow(self._connection, "/v1/events", after=after):
            if message.event not in (CHANGED, DELETED):
                continue  # how far live jobs are
            if message.event == DELETED:
                job, job_id = None, str(self._connection.decode(dict[str, Any], message.data).get("id", ""))
            else:
                job = self._connection.decode(Job, message.data)
                job_id = job.id
            yield JobChange(id=message.id or "", job_id=job_id, job=job)

    def job(self, job_id: str) -> Job:
        """A job as it is now."""
        return self._connection.get(Job, _of(job_id))

    def wait(self, job_id: str, *, timeout: float, states: Sequence[str] = ENDED) -> Job:
        """The job, once it is in one of these states or has ended. Raises ServiceError (`code` is `still_going`) when
        that takes more than `timeout` seconds; the job goes on then."""
        until, pause = time.monotonic() + timeout, 0.1
        while not ((job := self.job(job_id)).state in states or job.ended):
            left = until - time.monotonic()
            if left <= 0:
                raise ServiceError(
                    f"{job_id} is {job.state} after {timeout:g} s, and goes on: wait longer", code="still_going"
                )
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, LOOK_EVERY)
        return job

    def pause(self, job_id: str) -> Job:
        """Let a run finish what it has begun and then rest. Returns before it does."""
        return self._wish(job_id, "pause")

    def resume(self, job_id: str) -> Job:
        """Let a run that rests go on."""
        return self._wish(job_id, "resume")

    def cancel(self, job_id: str) -> Job:
        """End a job, with a checkpoint where it had begun. Returns before it has ended."""
        return self._wish(job_id, "cancel")

    def change(
        self,
        job_id: str,
        *,
        max_staleness: int | None = None,
        priority: int | None = None,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        revision: int | None = None,
    ) -> Job:
        """Change the bound (of a live run at once), the priority of a job that waits, its name, or all its labels.

        `revision`: of the job as you know it; where it has changed since, nothing is done (ServiceError, `code` is
        `changed`). Such a call is not repeated once it may have arrived: its own success would look like that.
        """
        values: dict[str, Any] = {"max_staleness": max_staleness, "priority": priority, "name": name, "labels": labels}
        body = {key: value for key, value in values.items() if value is not None}
        headers = {} if revision is None else {"If-Match": f'"{revision}"'}
        answer = self._connection.call("PATCH", _of(job_id), body=body, headers=headers, repeat=revision is None)
        return self._connection.decode(Job, answer)

    def delete(self, job_id: str, *, revision: int | None = None) -> None:
        """Forget a job that has ended, with everything that it wrote. `revision`: as in `change`.

        Not repeated once it may have arrived: a job that it has deleted would look like one that never was.
        """
        headers = {} if revision is None else {"If-Match": f'"{revision}"'}
        self._connection.call("DELETE", _of(job_id), headers=headers, repeat=False)

    # -- what a job says -----------------------------------------------------------------------------------------------

    def events(self, job_id: str, *, after: str | None = None) -> Iterator[Event]:
        """Everything that happened to a job (after the event of an id), and then what happens, until it has ended.

        Goes on over disconnects and restarts of the service; nothing is missed, and nothing told twice.
        """
        for message in follow(self._connection, f"{_of(job_id)}/events", after=after):
            yield self._connection.decode(Event, message.data)

    def past_events(self, job_id: str) -> Iterator[Event]:
        """What happened until now."""
        return self._pages(Page[Event], f"{_of(job_id)}/events", {})

    def logs(self, job_id: str, *, tail: int | None = None) -> Iterator[str]:
        """What the job wrote to its terminal until now (or its last lines), in pieces."""
        query: dict[str, Any] = {"tail": tail}
        while True:
            answer = self._connection.call("GET", f"{_of(job_id)}/logs", params=query)
            following = answer.headers.get("x-next-offset", "")
            text = answer.content.decode(errors="replace")
            if text:
                yield text
            if not text or not following or query.get("offset") == following:
                return
            query = {"offset": following}

    def follow_logs(self, job_id: str, *, tail: int | None = None) -> Iterator[str]:
        """The same and then what it writes, until the job has ended; goes on over disconnects."""
        for message in follow(self._connection, f"{_of(job_id)}/logs", {"tail": tail}):
            yield str(self._connection.decode(dict[str, Any], message.data).get("text", ""))

    def report(self, job_id: str) -> str:
        """The report of a run that has ended: one page of HTML. ServiceError (`no_report`) where there is none."""
        return self._connection.call("GET", f"{_of(job_id)}/report").content.decode(errors="replace")

    def checkpoints(self, job_id: str) -> Iterator[Checkpoint]:
        """Complete checkpoints of its run, oldest first."""
        return self._pages(Page[Checkpoint], f"{_of(job_id)}/checkpoints", {})

    # -- its run -------------------------------------------------------------------------------------------------------

    def queue(self, job_id: str) -> Queue:
        """What is in the queue of its run, live or ended; ServiceError (`run_not_begun`) before it has begun."""
        return self._connection.get(Queue, f"{_of(job_id)}/queue")

    def workers(self, job_id: str) -> list[Worker]:
        """What every worker does; empty for a run that does not go on."""
        return self._connection.get(Page[Worker], f"{_of(job_id)}/workers").data

    def drain(self, job_id: str, worker: str) -> Worker:
        """Let a worker of a live run start nothing new and finish what it has; others may do its stage meanwhile."""
        return self._steer(job_id, worker, "drain")

    def undrain(self, job_id: str, worker: str) -> Worker:
        """Let it go on."""
        return self._steer(job_id, worker, "undrain")

    def timeline(self, job_id: str, *, seconds: float = 60.0) -> list[Span]:
        """What every worker did in the last seconds (120 at most) of a run, which may have ended."""
        return self._connection.get(Timeline, f"{_of(job_id)}/timeline", {"seconds": seconds}).spans

    def engines(self, job_id: str) -> list[Engine]:
        """What every rollout engine serves; empty for a run that does not go on."""
        return self._connection.get(Page[Engine], f"{_of(job_id)}/engines").data

    def metrics(self, job_id: str, names: Sequence[str] | None = None, *, since_step: int = -1) -> Metrics:
        """Measurements of the steps after `since_step`; None takes all that there are."""
        query = {"names": None if names is None else ",".join(names), "since_step": since_step}
        return self._connection.get(Metrics, f"{_of(job_id)}/metrics", query)

    def samples(
        self,
        job_id: str,
        *,
        state: str | None = None,
        group_id: int | None = None,
        step: int | None = None,
        min_reward: float | None = None,
        max_reward: float | None = None,
        text: str | None = None,
    ) -> Iterator[SampleBrief]:
        """Samples for which all conditions hold, the latest first.

        `step`: that consumed them; `text`: part of their texts.
        """
        query = {"state": state, "group_id": group_id, "step": step, "min_reward": min_reward, "max_reward": max_reward}
        return self._pages(Page[SampleBrief], f"{_of(job_id)}/samples", {**query, "q": text})

    def sample(self, job_id: str, sample_id: int) -> Sample:
        """The whole life of a sample."""
        return self._connection.get(Sample, f"{_of(job_id)}/samples/{int(sample_id)}")

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _wish(self, job_id: str, wish: str) -> Job:
        # Wishing it twice is the same as once.
        return self._connection.decode(Job, self._connection.call("POST", f"{_of(job_id)}/{wish}"))

    def _steer(self, job_id: str, worker: str, wish: str) -> Worker:
        path = f"{_of(job_id)}/workers/{quote(worker, safe='')}/{wish}"
        return self._connection.decode(Worker, self._connection.call("POST", path))

    def _pages(self, type_: type[Page[Item]], path: str, query: Mapping[str, Any]) -> Iterator[Item]:
        cursor = None
        while True:
            page = self._connection.get(type_, path, {**query, "limit": MOST_IN_PAGE, "cursor": cursor})
            yield from page.data
            cursor = page.next_cursor
            if cursor is None:
                return


def _of(job_id: str) -> str:
    """The path of a job. Raises UserError for what cannot be the id of one."""
    if JOB_ID.fullmatch(job_id) is None:
        raise UserError(f"{job_id!r} is not the id of a job: `asyncflow jobs` lists them")
    return f"/v1/jobs/{job_id}"
