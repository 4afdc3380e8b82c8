"""The service and its live jobs as Prometheus metrics (https://prometheus.io/docs/concepts/data_model/).

Labels are bounded: at most `MOST_JOBS` jobs, and for each the stages, states and engines that it has. What is told of a
job is read when somebody asks; of requests it is counted as they come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

from asyncflow_api.runs import NotBegun, RunView
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncflow.errors import StoreError
from asyncflow.types import PolicyVersion

MOST_JOBS: Final = 50
"""Live jobs that are told of: the first ones of the list."""
MOST_ENGINES: Final = 64
BOUNDS: Final = (0, 1, 2, 4, 8, 16, 32)
"""Upper bounds of the buckets for staleness, in policy versions."""
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STREAM: Final = "text/event-stream"

LiveJobs = Callable[[], list[tuple[str, RunView]]]


class Durations:
    """Counts requests by route, method and status. Time runs until the answer is complete; of a stream, which goes on
    for as long as somebody listens, until it begins."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._seconds = Histogram(
            "asyncflow_http_request_duration_seconds",
            "Seconds until a request was answered",
            ("route", "method", "status"),
            buckets=SECONDS,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, counted = time.monotonic(), 500, False

        def count() -> None:
            nonlocal counted
            if not counted:
                counted = True
                # The path as it is declared: what clients write into it is without bound.
                route = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in METHODS else "other"
                self._seconds.labels(route, method, str(status)).observe(time.monotonic() - began)

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if Headers(raw=message.get("headers", [])).get("content-type", "").startswith(STREAM):
                    count()
            await send(message)

        try:
            await self._app(scope, receive, counted_send)
        finally:
            count()


METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class JobCollector(Collector):
    """Reads the live jobs whenever somebody scrapes."""

    def __init__(self, live_jobs: LiveJobs) -> None:
        self._live_jobs = live_jobs

    def collect(self) -> Iterator[Metric]:
        families = _Families()
        for job, view in self._live_jobs()[:MOST_JOBS]:
            with suppress(NotBegun, StoreError):  # it is just beginning, or ending
                families.add(job, view)
        yield from families.all()


class _Families:
    """All metrics of all jobs, of one scrape."""

    def __init__(self) -> None:
        self.samples = GaugeMetricFamily(
            "asyncflow_queue_samples", "Open samples: ready or leased at a stage", labels=("job", "stage", "state")
        )
        self.bytes = GaugeMetricFamily("asyncflow_queue_bytes", "Bytes of the data that are needed", labels=("job",))
        self.age = GaugeMetricFamily(
            "asyncflow_queue_oldest_age_seconds",
            "For how long the first sample has been at a stage",
            labels=("job", "stage"),
        )
        self.events = CounterMetricFamily(
            "asyncflow_samples", "Samples to which this happened", labels=("job", "event")
        )
        self.leases = GaugeMetricFamily("asyncflow_leases_active", "Leases that are held", labels=("job", "stage"))
        self.expired = CounterMetricFamily("asyncflow_lease_expired", "Leases that ran out", labels=("job",))
        self.staleness = HistogramMetricFamily(
            "asyncflow_sample_staleness_versions",
            "Staleness of samples when they were generated (in_flight), taken by the learner (in_queue) and trained",
            labels=("job", "phase"),
        )
        self.time = CounterMetricFamily(
            "asyncflow_stage_time_seconds",
            "Seconds that a worker was busy, idle or blocked",
            labels=("job", "stage", "state"),
        )
        self.version = GaugeMetricFamily(
            "asyncflow_policy_version",
            "Number of the policy version of the learner, and of what engines serve",
            labels=("job", "component"),
        )
        self.tokens = CounterMetricFamily(
            "asyncflow_tokens", "Response tokens that were generated, and that were trained", labels=("job", "kind")
        )

    def all(self) -> tuple[Metric, ...]:
        return (
            self.samples,
            self.bytes,
            self.age,
            self.events,
            self.leases,
            self.expired,
            self.staleness,
            self.time,
            self.version,
            self.tokens,
        )

    def add(self, job: str, view: RunView) -> None:
        queue = view.queue()
        for stage in queue.stages:
            self.samples.add_metric((job, stage.name, "ready"), stage.ready)
            self.samples.add_metric((job, stage.name, "leased"), stage.leased)
            if stage.oldest_age_seconds is not None:
                self.age.add_metric((job, stage.name), stage.oldest_age_seconds)
            held = sum(lease.stage == stage.name for lease in queue.leases)
            self.leases.add_metric((job, stage.name), held)
        self.bytes.add_metric((job,), queue.bytes)
        counts = queue.counts
        with view.follower.lock:
            follower = view.follower
            happened = {
                "admitted": counts.admitted,
                "generated": follower.generated,
                "trained": counts.trained,
                "dropped": sum(counts.dropped.values()),
                "quarantined": counts.quarantined,
                "requeued": counts.requeued,
                "masked": counts.masked,
                "restored": counts.restored,
            }
            for phase, left in follower.left.items():
                _add_histogram(self.staleness, (job, phase), left)
            self.tokens.add_metric((job, "generated"), follower.generated_tokens)
            self.tokens.add_metric((job, "trained"), follower.trained_tokens)
            self.expired.add_metric((job,), follower.expired)
        for event, samples in happened.items():
            self.events.add_metric((job, event), samples)
        components: dict[str, PolicyVersion] = {"learner": queue.learner}
        components |= {name[:100]: version for name, version in list(queue.served.items())[:MOST_ENGINES]}
        for component, version in components.items():
            self.version.add_metric((job, component), version.n)
        for worker in view.workers():
            self._add_time(job, worker)

    def _add_time(self, job: str, worker: Mapping[str, Any]) -> None:
        for state, seconds in worker["seconds"].items():
            self.time.add_metric((job, worker["name"], state), seconds)


def _add_histogram(family: HistogramMetricFamily, labels: tuple[str, ...], found: Mapping[int, int]) -> None:
    buckets = [
        (f"{bound:g}", float(sum(samples for staleness, samples in found.items() if staleness <= bound)))
        for bound in BOUNDS
    ]
    total = float(sum(found.values()))
    family.add_metric(
        labels, [*buckets, ("+Inf", total)], sum_value=float(sum(age * samples for age, samples in found.items()))
    )
