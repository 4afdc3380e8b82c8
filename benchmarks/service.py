"""The HTTP service under load: how fast it answers, what its streams lose, and what it takes from a run that trains.

    asyncflow bench service [--json FILE] [--only live,events,fleet] [--seconds 15] [--rounds 3]

A real service on a home of its own gets one job: configs/tiny.yaml with what `JOB` says, so that it trains without end.
In turns, nobody asks anything, and then `--streams` event streams are open (of the kinds of `--only`, in equal parts)
while `--rate` requests a second come (of `REQUESTS`, in turns), from a process of their own.

A request's time runs from when it was due, so a service that answers late is not asked less often. Events of a job have
consecutive places (n + m of the id `n.m`), so a stream knows what it was not told; `service_events_lost` counts that,
and what had happened when the last request was answered and had not come ten seconds later. `service_step_cost` is how
much longer a step takes under load, the median over pairs of turns: the client's own processor time is in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import yaml

from asyncflow.errors import AsyncFlowError
from asyncflow.rundir import METRICS
from benchmarks.machine import machine, spread, write_json
from benchmarks.service_client import Work
from benchmarks.store import filesystem

ROOT = Path(__file__).resolve().parents[1]
JOB = {
    "steps": 1_000_000,
    "rollout": {"engine": "fake", "max_concurrency": 16, "options": {"token_latency": 0.01}},
}
"""What is different from configs/tiny.yaml."""
REQUESTS = {
    "jobs": "/v1/jobs",
    "job": "/v1/jobs/{id}",
    "queue": "/v1/jobs/{id}/queue",
    "samples": "/v1/jobs/{id}/samples",
    "metrics": "/v1/jobs/{id}/metrics?names=reward,step_time&since_step={step}",
    "workers": "/v1/jobs/{id}/workers",
}
STREAMS = {"live": "/v1/jobs/{id}/live", "events": "/v1/jobs/{id}/events", "fleet": "/v1/events"}
STEPS_FIRST = 20
"""Steps that the run makes before anything is measured."""
DEADLINE = 300.0
"""Seconds until the run has made them, and for anything else."""
LOOP = 1_000_000
"""Additions, by whose time readers compare machines."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn without load and the one under load after it."""

    quiet_step: float
    """Seconds of a step, as `step`."""
    step: float
    quiet_cores: float
    """Processor time of the service for a second, as `cores`."""
    cores: float
    client_cores: float
    rss_mb: float
    """Memory of the service after it."""
    load: Mapping[str, Any]
    """What the client found."""


class Service:
    """`asyncflow serve` with one job that trains."""

    def __init__(self, home: Path, log: Path) -> None:
        command = [sys.executable, "-m", "asyncflow.cli", "serve", "--home", str(home), "--port", "0"]
        with log.open("w") as stream:
            self._process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT)
        self.home = home
        self._log = log
        self._wait("the service", (home / "service.json").exists)
        self.url = json.loads((home / "service.json").read_text())["url"]
        self.token = (home / "token").read_text()
        headers = {"Authorization": f"Bearer {self.token}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=DEADLINE)
        self.measured = psutil.Process(self._process.pid)

    def submit(self, config: Mapping[str, Any]) -> str:
        """Returns the job once it has made some steps."""
        answer = self._http.post("/v1/jobs", json={"config": config})
        answer.raise_for_status()
        self.job = str(answer.json()["id"])
        self._wait("the job", self._trains)
        return self.job

    def _trains(self) -> bool:
        job = self._http.get(f"/v1/jobs/{self.job}").json()
        if job["state"] == "failed":
            raise AsyncFlowError(f"the job failed: {job['reason']['message']}")
        return len(self.steps()) >= STEPS_FIRST

    @property
    def metrics(self) -> Path:
        return self.home / "jobs" / self.job / "run" / METRICS

    def steps(self) -> list[float]:
        """When each step was made, in seconds since the epoch."""
        if not self.metrics.exists():
            return []
        lines = [line for line in self.metrics.read_bytes().split(b"\n") if b'"step_time"' in line]
        return [json.loads(line)["at"] for line in lines]

    def used(self) -> float:
        """Processor seconds of the service itself."""
        times = self.measured.cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End the job, and then the service."""
        if hasattr(self, "job") and self._process.poll() is None:
            self._http.post(f"/v1/jobs/{self.job}/cancel")
            self._wait("the end of the job", self._ended)
        self._http.close()
        self._process.terminate()
        self._process.wait(DEADLINE)

    def _ended(self) -> bool:
        return self._http.get(f"/v1/jobs/{self.job}").json()["finished_at"] is not None

    def _wait(self, what: str, condition: Any) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AsyncFlowError(f"{what} did not come: {self._log.read_text()[-2000:]}")
            time.sleep(0.1)


@contextmanager
def service(folder: Path) -> Iterator[Service]:
    """With its job; both are ended."""
    config = {**yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text()), **JOB}
    print(f"the job: configs/tiny.yaml with {json.dumps(JOB)}", flush=True)
    found = Service(folder / "home", folder / "log")
    try:
        found.submit(config)
        yield found
    finally:
        found.close()


def step_time(steps: Sequence[float], began: float, ended: float) -> float:
    """Seconds of a step in this time; NaN for fewer than two steps."""
    inside = [at for at in steps if began <= at <= ended]
    return (inside[-1] - inside[0]) / (len(inside) - 1) if len(inside) > 1 else math.nan


def turn(served: Service, work: Work) -> Turn:
    """Both turns."""
    began, used = time.time(), served.used()
    time.sleep(work.seconds)
    ended = time.time()
    quiet_cores = (served.used() - used) / (ended - began)
    quiet_step = step_time(served.steps(), began, ended)
    with _client(work) as (client, measured):
        _line(client, "open")
        began, used, client_used = time.time(), served.used(), sum(measured.cpu_times()[:2])
        _line(client, "asked")
        ended = time.time()
        cores = (served.used() - used) / (ended - began)
        client_cores = (sum(measured.cpu_times()[:2]) - client_used) / (ended - began)
        rss = served.measured.memory_info().rss / 1e6
        output, errors = client.communicate(timeout=DEADLINE)
    if client.returncode:
        raise AsyncFlowError(f"the client failed: {errors[-2000:]}")
    return Turn(
        quiet_step=quiet_step,
        step=step_time(served.steps(), began, ended),
        quiet_cores=quiet_cores,
        cores=cores,
        client_cores=client_cores,
        rss_mb=rss,
        load=json.loads(output),
    )


@contextmanager
def _client(work: Work) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    command, pipe = [sys.executable, "-m", "benchmarks.service_client"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as client:
        try:
            assert client.stdin is not None
            client.stdin.write(json.dumps(asdict(work)))
            client.stdin.close()
            client.stdin = None
            yield client, psutil.Process(client.pid)
        finally:
            client.kill()


def _line(client: subprocess.Popen[str], said: str) -> None:
    assert client.stderr is not None
    line = client.stderr.readline()
    if line.strip() != said:
        raise AsyncFlowError(f"the client failed: {line}{client.stderr.read()[-2000:]}")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def summarise(turns: Sequence[Turn]) -> dict[str, Any]:
    """The keys, over all turns together, and how the turns differ."""
    together = [1000 * one for turn in turns for many in turn.load["seconds"].values() for one in many]
    each = [[1000 * one for many in turn.load["seconds"].values() for one in many] for turn in turns]
    costs = [turn.step / turn.quiet_step for turn in turns]
    names = turns[0].load["seconds"]
    return {
        "service_requests": len(together),
        "service_requests_p50_ms": percentile(together, 0.5),
        "service_requests_p99_ms": percentile(together, 0.99),
        "service_requests_refused": sum(
            count for turn in turns for name, count in turn.load["statuses"].items() if not name.endswith(" 200")
        ),
        "service_streams": min(turn.load["streams"] for turn in turns),
        "service_streams_silent": sum(turn.load["silent"] for turn in turns),
        "service_events": sum(sum(turn.load["events"].values()) for turn in turns),
        "service_events_lost": sum(turn.load["lost"] for turn in turns),
        "service_cpu_cores": statistics.median(turn.cores for turn in turns),
        "service_cpu_cores_quiet": statistics.median(turn.quiet_cores for turn in turns),
        "service_client_cpu_cores": statistics.median(turn.client_cores for turn in turns),
        "service_step_cost": statistics.median(costs),
        "service_step_ms": 1000 * statistics.median(turn.quiet_step for turn in turns),
        "service_rss_mb": max(turn.rss_mb for turn in turns),
        "problems": sorted({problem for turn in turns for problem in turn.load["problems"]}),
        "p99_ms": {
            name: percentile([1000 * one for turn in turns for one in turn.load["seconds"][name]], 0.99)
            for name in names
        },
        "spread": {
            "service_requests_p50_ms": spread([percentile(one, 0.5) for one in each]),
            "service_requests_p99_ms": spread([percentile(one, 0.99) for one in each]),
            "service_cpu_cores": spread([turn.cores for turn in turns]),
            "service_step_cost": spread(costs),
        },
    }


def loop_ms() -> float:
    """Milliseconds of a loop in Python on this machine now, the best of five."""

    def once() -> float:
        began = time.perf_counter()
        for number in range(LOOP):
            _ = number + 1
        return 1000 * (time.perf_counter() - began)

    return min(once() for _ in range(5))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write the JSON file after every round, and return what is in it."""
    parser = argparse.ArgumentParser(
        prog="asyncflow bench service", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="KIND,…", help=", ".join(STREAMS))
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the home is; default: the system's for temporary files")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if unknown := [kind for kind in arguments.only or () if kind not in STREAMS]:
        parser.error(f"there is no stream {', '.join(unknown)}; the streams are {', '.join(STREAMS)}")
    result: dict[str, Any] = {"benchmark": "service", "machine": machine(), "job": JOB, "loop_ms": loop_ms()}
    with tempfile.TemporaryDirectory(prefix="af-", dir=arguments.folder) as folder, service(Path(folder)) as served:
        result["medium"] = filesystem(Path(folder))
        print(f"files on {result['medium']}, load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, a loop of "
              f"{LOOP:,} additions takes {result['loop_ms']:.0f} ms", flush=True)  # fmt: skip
        turns = []
        for number in range(arguments.rounds):
            turns.append(turn(served, _work(served, arguments)))
            result |= {"load_at_end": list(os.getloadavg()), **summarise(turns), "turns": _plain(turns)}
            write_json(result, arguments.json)
            print(f"  round {number + 1}: load {os.getloadavg()[0]:.1f}", flush=True)
    for key, value in result.items():
        if key.startswith("service_"):
            print(f"{key:28} {value:10.4g}")
    print(f"{'p99 of each, ms':28} " + ", ".join(f"{name} {value:.0f}" for name, value in result["p99_ms"].items()))
    for problem in result["problems"]:
        print(f"  {problem}")
    return result


def _work(served: Service, arguments: argparse.Namespace) -> Work:
    parts = urlsplit(served.url)
    assert parts.hostname is not None
    assert parts.port is not None
    known = {"id": served.job, "step": len(served.steps()) - 5}
    return Work(
        host=parts.hostname,
        port=parts.port,
        token=served.token,
        paths={name: path.format(**known) for name, path in REQUESTS.items()},
        streams={kind: STREAMS[kind].format(**known) for kind in arguments.only or STREAMS},
        count=arguments.streams,
        rate=arguments.rate,
        seconds=arguments.seconds,
        metrics=str(served.metrics),
    )


def _plain(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Without the single requests."""
    return [asdict(replace(one, load={k: v for k, v in one.load.items() if k != "seconds"})) for one in turns]


if __name__ == "__main__":
    main()
