"""A run that exists only in memory: what it says at a tick follows from the tick alone. For the dashboard's tests.

Everything has the shapes that the service's routes give; `dashboard_backend` serves it.
"""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from asyncflow.report.bottleneck import in_words
from asyncflow.report.queue import MOST_STEPS

TICK = 0.25
"""Seconds of the run between two ticks."""
STEP = 12
"""Ticks of a step."""
BATCH, GROUP = 64, 8
ENGINES = ("rollout-0", "rollout-1")
STRAGGLER = 7
"""Every such step waits for a straggler, whose samples are staler than the others."""

Json = dict[str, Any]
Told = tuple[float, str, str, str, Json]
"""Tick, type, level, message, data."""

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> \u202e\u0007 {{7*7}} ${7*7}"
)
"""What a model may write."""


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def noise(*keys: int) -> float:
    """0 to 1, the same for the same keys."""
    mixed = math.sin(sum((place + 1) * 12.9898 * (key + 1.37) for place, key in enumerate(keys))) * 43758.5453
    return mixed - math.floor(mixed)


class MovingRun:
    """One run. `tick` may only grow; `bound` may be set at any time."""

    def __init__(self, *, tick: int, steps: int, bound: int, now: float) -> None:
        self.tick = tick
        self.steps = steps
        self.bound = bound
        self.began = now - tick * TICK
        self.bounds: dict[int, int] = {}
        """Step → the bound from then on."""
        self.drained: set[str] = set()
        self._samples: dict[int, Json] = {}
        self._totals: Counter[str] = Counter()
        """Staleness → samples of the first so many steps."""
        self._counted = 0
        self._told: list[Told] = []
        """Of the first so many steps."""
        self._told_steps = 0

    @property
    def step(self) -> int:
        return min(self.steps, self.tick // STEP)

    @property
    def phase(self) -> int:
        return self.tick % STEP

    @property
    def ended(self) -> bool:
        return self.step >= self.steps

    def at(self, tick: float) -> float:
        return self.began + tick * TICK

    def set_bound(self, bound: int) -> None:
        self.bounds.setdefault(0, self.bound)
        self.bounds[self.step + 1] = bound
        self.bound = bound

    def bound_at(self, step: int) -> int:
        return next((self.bounds[since] for since in sorted(self.bounds, reverse=True) if since <= step), self.bound)

    def progress(self) -> Json:
        seconds = self.tick * TICK
        left = (self.steps - self.step) * STEP * TICK
        return {"step": self.step, "steps": self.steps, "seconds": seconds, "eta_seconds": None if self.ended else left}

    # -- queue ---------------------------------------------------------------------------------------------------------

    def histogram(self, step: int) -> dict[str, int]:
        """Staleness of what a step trained: never above the bound."""
        bound = self.bound_at(step)
        oldest = 0 if bound == 0 else int(BATCH * (0.12 + 0.2 * noise(step, 1)) * (2.2 if step % STRAGGLER == 0 else 1))
        if step <= bound:
            return {"0": BATCH}
        if bound <= 1:
            return {"0": BATCH - oldest, str(bound): oldest} if oldest else {"0": BATCH}
        fresh = int((BATCH - oldest) * (0.2 + 0.3 * noise(step, 2)))
        return {"0": fresh, "1": BATCH - oldest - fresh, str(bound): oldest}

    def history(self) -> Json:
        made = range(max(1, self.step + 1 - MOST_STEPS), self.step + 1)
        return {
            "step": list(made),
            "histogram": [self.histogram(step) for step in made],
        }

    def live(self) -> Json:
        return {"queue": self.queue(), "workers": self.workers(), "progress": self.progress()}

    def queue(self) -> Json:
        step, phase, bound = self.step, self.phase, self.bound
        generating = 0 if self.ended else 40 + int(20 * noise(self.tick, 3))
        prompted = 0 if self.ended else max(0, BATCH - generating - phase * 3)
        generated = 0 if self.ended else int(10 * noise(self.tick, 4))
        rewarded = 0 if self.ended else phase * 4 + int(6 * noise(self.tick, 5))
        training = BATCH if phase < 7 and not self.ended else 0
        states = {
            "prompted": prompted,
            "generating": generating,
            "generated": generated,
            "rewarded": rewarded,
            "training": training,
        }
        dropped = {"zero_variance": (step // 3) * GROUP, "timeout": step // 11}
        lost, quarantined, opened = sum(dropped.values()), step // 20, sum(states.values())
        trained = step * BATCH - lost - quarantined
        served = {engine: f"0.{max(0, step - (phase < 3 + place * 3))}" for place, engine in enumerate(ENGINES)}
        while self._counted < step:
            self._counted += 1
            self._totals.update(self.histogram(self._counted))
        young = generating // 3
        in_flight = {"0": generating - young, "1": young} if bound else {"0": generating}
        waiting = generated + rewarded
        in_queue = {"0": waiting // 2, "1": waiting - waiting // 2} if bound else {"0": waiting}
        return {
            "object": "queue",
            "live": not self.ended,
            "at": rfc3339(self.at(self.tick)),
            "max_staleness": bound,
            "learner": f"0.{step}",
            "served": served,
            "oldest": None if self.ended else f"0.{max(0, step - min(bound, 1 + (phase > 8)))}",
            "counts": {
                "admitted": trained + lost + quarantined + opened,
                "trained": trained,
                "dropped": {reason: count for reason, count in dropped.items() if count},
                "quarantined": quarantined,
                "open": opened,
                "requeued": step // 9,
                "masked": 0,
                "restored": 0,
            },
            "states": states,
            "stages": self._stages(states),
            "leases": [
                {
                    "id": f"l{self.tick}-{place}",
                    "stage": "rollout",
                    "worker": engine,
                    "samples": generating // 2,
                    "seconds": 2.5,
                }
                for place, engine in enumerate(ENGINES)
            ],
            "staleness": {
                "in_flight": {level: count for level, count in in_flight.items() if count},
                "in_queue": {level: count for level, count in in_queue.items() if count},
                "at_training": dict(self._totals),
            },
            "history": self.history(),
            "bytes": 3_400_000 + opened * 11_000,
            "capacity": max(0, (bound + 1) * BATCH - opened),
            "bottleneck": None
            if self.ended
            else {
                "stage": "rollout",
                "text": "Generation is the bottleneck: the learner waited 38% of the time for rollouts, and generation "
                "was busy 93%. Add rollout capacity (rollout.cores, rollout.max_concurrency).",
            },
        }

    def _stages(self, states: dict[str, int]) -> list[Json]:
        rate = 0.0 if self.ended else 20.5 + 2 * noise(self.tick, 6)
        rows = (
            ("rollout", "generate", states["prompted"], states["generating"], 1.9, rate, rate - 0.4),
            ("reward", "score", states["generated"], 2 * (not self.ended), 0.1, rate - 0.4, rate - 0.3),
            ("reference", "score", states["generated"] // 2, 8 * (not self.ended), 0.3, rate - 0.4, rate),
            ("actor_update", "train", states["rewarded"], states["training"], 2.6, rate - 0.3, rate * 1.6),
        )
        return [
            {
                "name": name,
                "role": role,
                "ready": ready,
                "leased": leased,
                "oldest_age_seconds": age if ready else None,
                "in_per_second": round(came, 2),
                "out_per_second": round(went, 2),
                "time_to_empty_seconds": round(ready / (went - came), 1) if ready and went > came + 0.2 else None,
            }
            for name, role, ready, leased, age, came, went in rows
        ]

    # -- who does what -------------------------------------------------------------------------------------------------

    def workers(self) -> list[Json]:
        if self.ended:
            return []
        training, updating = self.phase < 7, self.phase < 3
        rows = (
            ("feeder", None, "blocked", "bound", (0.03, 0.05, 0.92)),
            ("rollout-0", "rollout", "busy", None, (0.94, 0.06, 0.0)),
            (
                "rollout-1",
                "rollout",
                "blocked" if updating else "busy",
                "weights" if updating else None,
                (0.86, 0.04, 0.1),
            ),
            ("reward", "reward", "busy" if self.tick % 3 == 0 else "idle", "rollout", (0.08, 0.92, 0.0)),
            ("reference", "reference", "busy" if self.tick % 4 else "idle", "rollout", (0.41, 0.59, 0.0)),
            ("actor_update", "actor_update", "busy" if training else "idle", "rollout", (0.58, 0.38, 0.04)),
            ("weights", None, "busy" if updating else "idle", "actor_update", (0.22, 0.78, 0.0)),
        )
        return [
            {
                "name": name,
                "stage": stage,
                "activity": activity,
                "cause": None if activity == "busy" else cause,
                "waits_for": None if activity == "busy" or cause is None else in_words(cause),
                "since_seconds": (self.phase % 7) * TICK,
                "heartbeat_seconds": 0.4,
                "drained": name in self.drained,
                "shares": dict(zip(("busy", "idle", "blocked"), shares, strict=True)),
            }
            for name, stage, activity, cause, shares in rows
        ]

    def timeline(self, seconds: float) -> Json:
        spans: list[Json] = []
        until = self.at(self.tick)

        def add(worker: str, activity: str, began: float, ended: float, cause: str | None = None) -> None:
            start, end = self.at(began), min(self.at(ended), until)
            if end > start and end > until - seconds:
                spans.append({"worker": worker, "activity": activity, "start": start, "end": end, "cause": cause})

        first = max(0, self.step - int(seconds / TICK / STEP) - 1)
        for step in range(first, self.step + 1):
            t, late = float(step * STEP), 1.5 if step % STRAGGLER == 0 else 0.0
            add("feeder", "blocked", t + 0.4, t + STEP, "bound")
            add("feeder", "busy", t, t + 0.4)
            add("rollout-0", "busy", t, t + 11.4)
            add("rollout-0", "idle", t + 11.4, t + STEP, "feeder")
            add("rollout-1", "blocked", t, t + 1.2, "weights")
            add("rollout-1", "busy", t + 1.2, t + STEP)
            for batch in range(4):
                add("reward", "busy", t + 2 + batch * 2.7, t + 2.3 + batch * 2.7)
                add("reference", "busy", t + 2 + batch * 2.7, t + 3.2 + batch * 2.7)
            add("actor_update", "idle", t, t + 3.5 + late, "rollout")
            add("actor_update", "busy", t + 3.5 + late, t + 11.2)
            add("actor_update", "blocked", t + 11.2, t + STEP, "weights")
            add("weights", "busy", t + 0.2, t + 1.2)
            for lane in range(24):
                began = t + 0.8 * noise(step, lane, 1)
                for turn in range(4):
                    tail = turn == 1 and lane == (step * 5) % 24
                    ended = t + STEP - 0.2 if tail else began + 0.6 + 1.8 * noise(step, lane, turn, 2)
                    add(f"generation/{lane}", "busy", began, ended)
                    began = ended + 0.1
                    if tail:
                        break
        return {"object": "timeline", "spans": spans}

    def engines(self) -> list[Json]:
        served = self.queue()["served"]
        return [
            {
                "name": engine,
                "kind": "vllm",
                "served": version,
                "digest": digest(int(version.split(".")[1])),
                "attested": None if self.phase == 0 else True,
                "in_flight": 0 if self.ended else 20 + place,
            }
            for place, (engine, version) in enumerate(served.items())
        ]

    # -- measurements --------------------------------------------------------------------------------------------------

    def metrics(self, since: int, names: list[str] | None, points: int) -> Json:
        made = [step for step in range(1, self.step + 1) if step > since]
        series: dict[str, dict[str, list[Any]]] = {
            name: {"step": made, "time": [rfc3339(self.at(step * STEP)) for step in made], "value": values}
            for name, values in self._values(made).items()
        }
        evaluated = [step for step in range(0, self.step + 1, 10) if step > since]
        series["eval/accuracy"] = {
            "step": evaluated,
            "time": [rfc3339(self.at(step * STEP)) for step in evaluated],
            "value": [round(0.18 + 0.62 * (1 - math.exp(-step / 45)) + 0.02 * noise(step, 9), 3) for step in evaluated],
        }
        shown = {
            name: {key: column[:: -(-len(column) // points) or 1] for key, column in one.items()}
            for name, one in series.items()
            if names is None or name in names
        }
        return {"object": "metrics", "names": sorted(series), "series": shown}

    def _values(self, made: list[int]) -> dict[str, list[float]]:
        learned = {step: 1 - math.exp(-step / 50) for step in made}
        late = {step: step % STRAGGLER == 0 for step in made}
        return {
            "reward": [0.12 + 0.6 * learned[step] + 0.12 * (noise(step, 10) - 0.5) for step in made],
            "entropy": [2.4 - 1.3 * learned[step] + 0.06 * noise(step, 11) for step in made],
            "kl": [0.011 * learned[step] * (1 + 0.3 * noise(step, 12)) for step in made],
            "mismatch_kl": [3e-4 + 2e-4 * noise(step, 13) + 6e-4 * late[step] for step in made],
            "ratio/behaviour_mean": [1 + 0.004 * (noise(step, 14) - 0.5) for step in made],
            "ratio/behaviour_max": [1.4 + 0.9 * noise(step, 15) + late[step] for step in made],
            "ratio/proximal_mean": [1.0 for _ in made],
            "ratio/truncated": [0.001 + 0.004 * noise(step, 16) for step in made],
            "clip_ratio/region_mean": [0.01 + 0.006 * noise(step, 17) for step in made],
            "ess": [0.97 - 0.03 * noise(step, 18) - 0.05 * late[step] for step in made],
            "frac_reward_zero_std": [0.1 + 0.25 * learned[step] + 0.08 * noise(step, 19) for step in made],
            "completions/mean_length": [60 + 40 * learned[step] + 8 * noise(step, 20) for step in made],
            "completions/truncated_frac": [0.05 + 0.03 * noise(step, 21) for step in made],
            "grad_norm": [0.8 + 0.4 * noise(step, 22) for step in made],
            "loss": [0.02 * (noise(step, 23) - 0.5) for step in made],
            "learning_rate": [1e-5 for _ in made],
            "rollout/generated_tok_s": [1650 + 300 * noise(step, 24) for step in made],
            "step_time": [3.0 + 0.4 * late[step] for step in made],
            "perf/rollout_wait_s": [1.1 + 0.4 * late[step] for step in made],
            "perf/fwd_bwd_s": [1.7 + 0.05 * noise(step, 25) for step in made],
            "perf/weight_sync_s": [0.12 + 0.02 * noise(step, 26) for step in made],
        }

    def events(self) -> list[Told]:
        """Everything that its metrics file says so far."""
        while self._told_steps < self.step:
            self._told += self._events_of(self._told_steps)
            self._told_steps += 1
        return self._told + [event for event in self._events_of(self.step) if event[0] <= self.tick]

    def _events_of(self, step: int) -> list[Told]:
        t, version, name = float(step * STEP), f"0.{step}", digest(step)
        published = {"version": version, "digest": name, "publish_s": 0.12}
        told: list[Told] = [(t, "weights", "info", f"Version {version} is published.", published)]
        if step:
            reward = self._values([step])["reward"][0]
            told.append((t, "step", "info", f"Step {step}: reward {reward:.3f}.", {"step": step}))
        for place, engine in enumerate(ENGINES):
            loaded = {"engine": engine, "version": version, "digest": name, "update_s": 0.3 + place * 0.2}
            told.append((t + 3 + place * 3, "served", "info", f"{engine} serves version {version}.", loaded))
        if step and step % 20 == 0:
            told.append((t + 0.5, "checkpoint", "info", f"A checkpoint of step {step} is complete.", {"step": step}))
        if step and step % 40 == 0:
            text = f"Sample {step * 70} takes 14 s so far; half of the others took less than 0.8 s."
            told.append((t + 5, "alarm", "warning", text, {"alarm": "rollout_slow", "samples": [step * 70]}))
        return sorted(told, key=lambda event: event[0])

    # -- samples -------------------------------------------------------------------------------------------------------

    def samples(self) -> list[Json]:
        """The newest 960, newest first, each with everything that is known of it."""
        last = self.step * BATCH + 3 * BATCH
        return [self.sample(number) for number in range(last, max(0, last - 960), -1)]

    def sample(self, number: int) -> Json:
        step = (number - 1) // BATCH + 1
        state = "trained" if step <= self.step else ("rewarded", "generating", "prompted")[min(2, step - self.step - 1)]
        key = number * 10 + ("prompted", "generating", "rewarded", "trained").index(state)
        if key not in self._samples:
            self._samples[key] = self._make(number, step, state)
        return self._samples[key]

    def _make(self, number: int, step: int, state: str) -> Json:
        a, b = int(90 * noise(number // GROUP, 30)) + 5, int(90 * noise(number // GROUP, 31)) + 5
        right = noise(number, 32) < 0.15 + 0.6 * (1 - math.exp(-step / 50))
        answer = a + b if right else a + b + 1 + int(8 * noise(number, 33))
        tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
        words = ["Let", " me", " add", " the", " tens", " first", ":", f" {a // 10 * 10}", " +", f" {b // 10 * 10}"]
        words += [" =", f" {tens}", ".", "\n", "Then", " the", " ones", ":", f" {a % 10}", " +", f" {b % 10}", " ="]
        words += [f" {ones}", ".", "\n", "Together", " that", " is", f" {answer}", ".", "<eos>"]
        if number % 37 == 0:
            words = [HOSTILE[at : at + 9] for at in range(0, len(HOSTILE), 9)] + words
        done = state in ("rewarded", "trained")
        words = words if done else words[:11] if state == "generating" else []
        newest = max(0, min(step - 1, self.step))
        oldest = max(0, newest - (1 if number % 3 == 0 else 0) - (1 if number % 12 == 0 else 0))
        cuts = [len(words) * (at + 1) // (newest - oldest + 1) for at in range(newest - oldest + 1)]
        tokens = []
        for place, text in enumerate(words):
            version = oldest + next(index for index, cut in enumerate(cuts) if place < cut)
            logprob = -round(2.5 * noise(number, place, 34) ** 3, 4)
            tokens.append({
                "id": 200 + int(40_000 * noise(place, len(text), 35)),
                "text": text,
                "logprob": logprob,
                "ref_logprob": round(logprob - 0.05 * noise(number, place, 36), 4),
                "version": f"0.{version}",
                "masked": number % 5 == 0 and place < 4,
            })  # fmt: skip
        prompt = f"What is {a} + {b}?"
        began = self.at((step - 1) * STEP)
        life = [
            ("admitted", f"Admitted as sample {number} of group {number // GROUP}."),
            ("leased", f"Leased by {ENGINES[number % 2]} for rollout."),
        ]
        if done:
            life += [
                ("generated", f"Generated: {len(words)} tokens, oldest of version 0.{oldest}."),
                ("rewarded", "All columns for training are there."),
            ]
        if state == "trained":
            life.append(("trained", f"Trained in step {step} at staleness {newest - oldest}."))
        return {
            "id": number,
            "group_id": number // GROUP,
            "state": state,
            "step": step if state == "trained" else None,
            "attempts": 2 if number % 29 == 0 else 1,
            "staleness": newest - oldest if done else None,
            "reward": (1.0 if right else 0.1) if done else None,
            "prompt": prompt,
            "response": "".join(words),
            "versions": [f"0.{version}" for version in range(oldest, newest + 1)] if words else [],
            "prompt_tokens": [{"id": 300 + place, "text": text} for place, text in enumerate(prompt.split())],
            "tokens": tokens,
            "reward_parts": {"exact": 1.0 if right else 0.0, "format": 0.1} if done else {},
            "events": [
                {"lsn": number * 10 + place, "at": rfc3339(began + place * 0.7), "type": kind, "message": message}
                for place, (kind, message) in enumerate(life)
            ],
            "finish_reason": "stop" if done else None,
        }


def digest(version: int) -> str:
    return f"{int(noise(version, 40) * 2**52):013x}{int(noise(version, 41) * 2**52):013x}"
