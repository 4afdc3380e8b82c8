"""The report page: everything on it is from the run, and nothing on it is from anywhere else."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncflow.errors import LedgerError
from asyncflow.report.audit import audit
from asyncflow.report.charts import number, rolling, thin, ticks
from asyncflow.report.page import write_report
from asyncflow.store.events import Event, Leased, Opened
from asyncflow.store.journal import Journal
from asyncflow.store.schema import PROMPT_COLUMNS, Schema, Stage
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion

SCHEMA = Schema(
    (
        Stage(name="rollout", role="generate", needs=PROMPT_COLUMNS, writes=("response_ids", "token_versions")),
        Stage(name="reward", role="score", needs=("response_ids",), writes=("reward",)),
        Stage(name="actor_update", role="train", needs=("response_ids", "token_versions", "reward")),
    )
)


def write_ledger(folder: Path, *, steps: int, batch: int, n: int, eta: int, seed: int = 0) -> list[list[int]]:
    """The ledger of a run whose engine follows the learner after some delay. Returns each step's staleness."""
    chance = random.Random(seed)
    terms = Opened(
        train_batch_size=batch, num_generations=n, max_staleness=eta, last_version=steps, min_group=2, max_attempts=3
    )
    table, journal = Table(SCHEMA, terms), Journal.create(folder / "ledger.sqlite", terms, 0.0, SCHEMA)
    served, staleness = 0, []

    def do(events: list[Event] | None) -> bool:
        journal.append(events or [], 0.0)
        for event in events or []:
            table.apply(event)
        return bool(events)

    def take(stage: str, rows: int) -> Leased | None:
        events = table.lease(stage, worker=stage, max_rows=rows, max_tokens=None, deadline=1e9)
        do(events)
        return events[-1] if events and isinstance(events[-1], Leased) else None

    do(table.serve("vllm", PolicyVersion(n=0)))
    while table.learner.n < steps:
        while do(table.admit([20], frame=0)):
            pass
        for _ in range(chance.randint(1, max(1, 3 * batch // n))):
            if (lease := take("rollout", n)) is None:
                break
            rows = list(lease.rows)
            if chance.random() < 0.02:
                do(table.nack(lease.lease_id, rows[:1], reason="the reward function raised ValueError", final=True))
                rows = rows[1:]
            newest = PolicyVersion(n=min(table.learner.n, served + (chance.random() < 0.1))).packed
            do(
                table.ack(
                    lease.lease_id,
                    rows,
                    columns=SCHEMA.writes["rollout"],
                    frame=0,
                    tokens=[12] * len(rows),
                    oldest=[PolicyVersion(n=served).packed] * len(rows),
                    newest=[newest] * len(rows),
                )
            )
        while (lease := take("reward", batch)) is not None:
            do(table.ack(lease.lease_id, lease.rows, columns=SCHEMA.writes["reward"], frame=0))
        if (lease := take("actor_update", batch)) is not None and table.taken.count * n == batch:
            flat = [row for row in lease.rows if row // n % 7 == 0]
            rows = [row for row in lease.rows if row not in flat]
            staleness.append(table.staleness(np.array(rows)).tolist())
            version = PolicyVersion(n=table.learner.n + 1)
            do(table.commit(leases=[lease.lease_id], trained=rows, skipped=flat, version=version))
        if chance.random() < 0.75 or served < table.learner.n - 1:
            served = table.learner.n
            do(table.serve("vllm", PolicyVersion(n=served)))
    journal.close()
    return staleness


def make_run(folder: Path, *, steps: int = 12, batch: int = 16, n: int = 4, eta: int = 2, seed: int = 0) -> Path:
    """A run directory as a healthy run leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    staleness = write_ledger(folder, steps=steps, batch=batch, n=n, eta=eta, seed=seed)
    lines: list[dict[str, Any]] = []

    def learned(step: int) -> float:
        return 0.065 + 0.3 * (1 - math.exp(-step / (steps / 2.2)))

    def log(kind: str, **values: Any) -> None:
        lines.append({"kind": kind, "at": 1.79e9 + len(lines), **values})

    def evaluate(step: int) -> None:
        accuracy = round(learned(step) * 200) / 200
        log("eval", step=step, versions=[f"0.{step}"], **{"eval/accuracy": accuracy, "eval/size": 200})

    log("weights", version="0.0", digest="xxh3-00", publish_s=0.2, bytes=269_000_000)
    evaluate(0)
    for step in range(1, steps + 1):
        ages = staleness[step - 1]
        forward, optim, sync = chance.gauss(7.2, 0.5), chance.gauss(0.55, 0.04), chance.gauss(0.35, 0.05)
        wait = max(0.1, chance.gauss(2.6, 1.1) + (9 if step == 1 else 0))
        seconds = forward + optim + sync + wait
        log("served", engine="vllm", version=f"0.{step - 1}", digest=f"xxh3-{step - 1:02}", update_s=0.3)
        log(
            "step",
            step=step,
            policy_version=f"0.{step}",
            reward=min(1.0, max(0.0, learned(step) + chance.gauss(0, 0.035))),
            reward_std=0.3,
            frac_reward_zero_std=0.14,
            samples=len(ages),
            skipped=batch - len(ages),
            tokens=len(ages) * 12,
            loss=chance.gauss(0, 0.01),
            grad_norm=chance.gauss(1.1, 0.2),
            learning_rate=1e-5,
            ess=min(1.0, chance.gauss(0.985, 0.005) - 0.0005 * step),
            mismatch_kl=abs(chance.gauss(4e-4, 1e-4)),
            entropy=1.1 - 0.01 * step,
            step_time=seconds,
            **{
                "completions/mean_length": chance.gauss(12, 0.5),
                "completions/truncated_frac": 0.01,
                "sample/staleness_mean": sum(ages) / max(1, len(ages)),
                "sample/staleness_max": max(ages, default=0),
                "clip_ratio/low": 0.0,
                "clip_ratio/high": 0.001,
                "ratio/behaviour_mean": 1.0,
                "ratio/behaviour_max": 1.6,
                "perf/rollout_wait_s": wait,
                "perf/fwd_bwd_s": forward,
                "perf/optim_s": optim,
                "perf/weight_sync_s": sync,
                "rollout/generated_tok_s": batch * 12 / seconds,
                "rollout/completions_s": batch / seconds,
            },
        )
        log("weights", version=f"0.{step}", digest=f"xxh3-{step:02}", publish_s=0.2, bytes=269_000_000)
        if step % max(1, steps // 4) == 0:
            evaluate(step)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = {
        "name": "quickstart",
        "model": "smollm2-135m",
        "algorithm": "grpo",
        "steps": steps,
        "train_batch_size": batch,
        "num_generations": n,
        "max_staleness": eta,
        "learning_rate": 1e-5,
        "data": {"train": "reasoning_gym:chain_sum", "eval_size": 200, "options": {"max_terms": 2}},
        "reward": [{"use": "last_number", "weight": 1.0}],
        "rollout": {"engine": "vllm", "dtype": "bf16", "cores": None},
    }
    summary = {
        "outcome": "finished",
        "reason": None,
        "steps": steps,
        "seconds": 552.4,
        "accuracy_before": 0.065,
        "accuracy_after": round(learned(steps) * 200) / 200,
        "weights": "weights",
        "digest": f"xxh3-{steps:02}",
    }
    write(folder, "config.json", config)
    write(folder, "summary.json", summary)
    return folder


def write(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")


def change(folder: Path, file: str, /, **values: Any) -> None:
    write(folder, file, json.loads((folder / file).read_text(encoding="utf-8")) | values)


class Page(HTMLParser):
    """Parses a page and insists that every element is closed in order."""

    VOID = frozenset({"meta", "link", "br", "path", "rect"})

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"closed but never opened: {tag}"
        assert self.open[-1] == tag, f"{tag} closed inside {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def charts(self) -> list[str]:
        """What each chart says of itself."""
        return [str(attributes["aria-label"]) for _, attributes in self.tags if attributes.get("role") == "img"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return Page(write_report(run_dir))


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the run to take things away from."""
    for name in ("config.json", "summary.json", "metrics.jsonl", "ledger.sqlite"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    return tmp_path


def test_the_report_is_in_the_run_directory(run_dir: Path) -> None:
    path = write_report(run_dir)

    assert path == run_dir / "report.html"
    assert not list(run_dir.glob("*.part"))


def test_the_page_fetches_nothing_and_runs_nothing(page: Page) -> None:
    assert not re.search(r"https?://|//[a-z]|url\(|@import", page.html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object", "embed", "audio", "video"})
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:,") == "data:,"
    (policy,) = [tag["content"] for tag in page.named("meta") if "http-equiv" in tag]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_head_says_what_ran_and_how_it_ended(page: Page) -> None:
    assert "quickstart" in page.text
    assert "smollm2-135m · GRPO · max_staleness 2 · 12 of 12 steps in 9 min 12 s" in page.text
    assert "Finished" in page.text
    assert re.search(r"0\.065 → 0\.3\d\d \+0\.\d+", page.text)
    assert "Held-out accuracy before and after on 200 problems" in page.text


def test_the_account_is_the_audits(run_dir: Path, page: Page) -> None:
    books = audit(run_dir)

    assert books.ok, books.violations
    dropped = sum(books.dropped.values())
    assert (
        f"{books.admitted:,} admitted = {books.trained:,} trained + {dropped:,} dropped + "
        f"{books.quarantined:,} quarantined + {books.open:,} open"
    ) in page.text
    assert books.verdict in page.text
    for reason, count in [*books.dropped.items(), *books.quarantine_reasons.items()]:
        assert f"{reason} {count:,} {count / books.admitted:.1%}" in page.text
    for value, count in books.staleness.items():
        assert f"{count / books.trained:.0%} at {value}" in page.text


def test_every_chart_says_in_words_what_it_shows(page: Page) -> None:
    charts = page.charts()

    assert len(charts) == 8
    assert all(len(words) > 15 and any(c.isdigit() for c in words) for words in charts)
    for chart in page.named("svg"):
        assert chart["aria-hidden"] == "true"


def test_folded_parts_can_be_opened_and_scrolled_from_the_keyboard(page: Page) -> None:
    assert len(page.named("details")) == len(page.named("summary")) == 3
    regions = [attributes for _, attributes in page.tags if attributes.get("role") == "region"]
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)


def test_both_themes_and_narrow_screens_have_their_rules(page: Page) -> None:
    assert "prefers-color-scheme: dark" in page.html
    assert "max-width: 52rem" in page.html
    assert [tag for tag in page.named("meta") if tag.get("name") == "viewport"]


def test_the_configuration_is_there_in_full(page: Page) -> None:
    for line in ('data.train "reasoning_gym:chain_sum"', "data.options.max_terms 2", "max_staleness 2"):
        assert line in page.text


def test_served_digests_are_compared_with_what_was_published(copy: Path, page: Page) -> None:
    assert "all 12 equal what was published" in page.text

    lines = (
        (copy / "metrics.jsonl")
        .read_text()
        .replace('"version": "0.3", "digest": "xxh3-03", "up', '"version": "0.3", "digest": "old", "up')
    )
    (copy / "metrics.jsonl").write_text(lines)

    assert "1 of 12 differ from what was published" in Page(write_report(copy)).text


# -- runs that did not go well -----------------------------------------------------------------------------------------


def test_a_run_without_a_summary_was_interrupted(copy: Path) -> None:
    (copy / "summary.json").unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "at": 1.0, "ste')  # torn by the kill

    page = Page(write_report(copy))

    assert "No summary The run left no summary: it was killed, or it still goes on." in page.text
    assert "12 of 12 steps" in page.text
    assert re.search(r"0\.065 → 0\.3", page.text)  # from the evaluations


def test_a_failed_run_says_why(copy: Path) -> None:
    change(copy, "summary.json", outcome="failed", reason="the engine died", accuracy_after=None)

    assert "Failed the engine died" in Page(write_report(copy)).text


def test_nothing_measured_is_said_in_the_place_of_each_chart(copy: Path) -> None:
    (copy / "metrics.jsonl").write_text("")
    change(copy, "summary.json", steps=0, accuracy_before=None, accuracy_after=None)

    page = Page(write_report(copy))

    assert len(page.charts()) == 1  # the ledger still has the staleness
    assert "No step was made and nothing was evaluated." in page.text
    assert "Held-out accuracy was not measured." in page.text
    assert "0 of 12 steps" in page.text


def test_a_run_that_never_evaluated_still_shows_its_rewards(copy: Path) -> None:
    lines = [line for line in (copy / "metrics.jsonl").read_text().splitlines() if '"eval"' not in line]
    (copy / "metrics.jsonl").write_text("\n".join(lines))

    assert "There was no held-out evaluation." in Page(write_report(copy)).text


@pytest.mark.parametrize("left", ["config.json", "summary.json", "metrics.jsonl", "ledger.sqlite"])
def test_one_file_is_enough_for_a_page(copy: Path, left: str) -> None:
    for path in copy.iterdir():
        if path.name != left:
            path.unlink()

    page = Page(write_report(copy))

    assert ("The ledger cannot be read: there is none." in page.text) == (left != "ledger.sqlite")


def test_a_broken_ledger_is_reported_without_the_path_of_the_machine(copy: Path) -> None:
    (copy / "ledger.sqlite").write_bytes(b"broken" * 1000)

    page = Page(write_report(copy))

    assert "The ledger cannot be read: ledger.sqlite cannot be read as a ledger" in page.text
    assert str(copy) not in page.html


def test_violations_are_listed(copy: Path) -> None:
    ledger = copy / "ledger.sqlite"
    ledger.write_bytes(ledger.read_bytes().replace(b'"max_staleness":2', b'"max_staleness":0'))

    page = Page(write_report(copy))

    assert "violated" in page.text
    assert "above the bound of 0" in page.text


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no run in"):
        write_report(tmp_path)

    assert not list(tmp_path.iterdir())


def test_hostile_text_stays_text(copy: Path) -> None:
    attack = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    change(copy, "config.json", name=attack, model=attack, algorithm=attack, **{attack: attack})
    change(copy, "summary.json", outcome=attack, reason=attack, digest=attack, weights=attack)
    ledger = copy / "ledger.sqlite"
    reason, hostile = b"the reward function raised ValueError", b"<script>'\"><img onerror=alert(1)>&&&&"
    assert len(reason) == len(hostile)
    ledger.write_bytes(ledger.read_bytes().replace(reason, hostile.replace(b'"', b"'")))

    page = Page(write_report(copy))

    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert page.text.count("<script>") >= 6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "many", True, [1]])
def test_values_that_are_no_numbers_are_left_out(copy: Path, value: Any) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in line.keys() - {"kind", "at", "step"}:
            if line["kind"] != "step" or line["step"] % 2:
                line[key] = value
    (copy / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    change(copy, "summary.json", seconds=value, steps=value, accuracy_before=value, accuracy_after=value)

    page = Page(write_report(copy))

    assert not re.search(r"\b(nan|inf)\b", page.html.lower())
    assert len(page.charts()) == 8


def test_one_step_is_enough_for_every_chart(tmp_path: Path) -> None:
    assert len(Page(write_report(make_run(tmp_path / "run", steps=1))).charts()) == 8


def test_a_long_run_makes_a_page_that_stays_small(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    many = [json.dumps(steps[i % len(steps)] | {"step": i + 1}) for i in range(20_000)]
    (copy / "metrics.jsonl").write_text("\n".join(many))

    path = write_report(copy)

    assert path.stat().st_size < 400_000
    assert "Every 50th step" in Page(path).text


# -- the parts of charts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.065, "0.065"),
        (0.1234567, "0.123"),
        (2.5, "2.5"),
        (12.3456, "12.3"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (1e-5, "1.0e-5"),
        (-0.25, "-0.25"),
        (40, "40"),
        (9.999, "10"),
    ],
)
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.367), (0, 14000), (-3, 5), (0, 0), (7, 7), (1e-4, 9e-4)])
def test_ticks_are_few_even_and_span_the_values(low: float, high: float) -> None:
    found = ticks(low, high)

    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 7
    gaps = {round(b - a, 9) for a, b in pairwise(found)}
    assert len(gaps) == 1


def test_long_curves_are_thinned_to_their_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(1000)]

    thinned = thin(points, 100)

    assert len(thinned) == 100
    assert {y for _, y in thinned} == {0.5}
    assert thin(points[:50], 100) == points[:50]


def test_rolling_means_look_back() -> None:
    assert rolling([(1.0, 3.0), (2.0, 5.0), (3.0, 7.0)], 2) == [(1.0, 3.0), (2.0, 4.0), (3.0, 6.0)]
