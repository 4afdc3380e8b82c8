"""The picture of a few steps: the right ones, small, and honest about what it leaves out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from asyncflow.clock import ManualClock
from asyncflow.report.gantt import MAX_LANES, Window, gantt, merged, narrowed, stage_shares, windows
from asyncflow.report.page import write_report
from asyncflow.rundir import TRACE
from asyncflow.runtime.timeline import Span, TraceTimeline
from tests.test_report import Page, make_run


def steps(count: int, *, evaluated: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [
        {"step": n, "at": 1000.0 + 10 * n, "step_time": 9.0, "stage/evaluator/busy": 0.5 if n in evaluated else 0.0}
        for n in range(1, count + 1)
    ]


def shown(found: list[Window]) -> list[tuple[int, int]]:
    return [(window.first, window.last) for window in found]


def test_three_steps_in_the_middle_of_the_run_are_shown_or_fewer() -> None:
    assert shown(windows(steps(11))) == [(6, 8), (6, 7), (7, 7)]


def test_a_window_begins_with_its_first_step_and_ends_with_its_last() -> None:
    wide = windows(steps(11))[0]

    assert (wide.began, wide.ended) == (1060.0 - 9.0, 1080.0)


def test_the_first_step_and_steps_with_an_evaluation_are_left_out_when_that_is_possible() -> None:
    assert shown(windows(steps(8, evaluated=(4,)))) == [(6, 8), (6, 7), (6, 6)]
    assert shown(windows(steps(6, evaluated=(3, 5)))) == [(4, 4)]
    assert shown(windows(steps(2))) == [(2, 2)]
    assert shown(windows(steps(3, evaluated=(2, 3)))) == [(1, 3), (2, 3), (2, 2)]


def test_short_runs_have_what_there_is() -> None:
    assert windows([]) == []
    assert shown(windows(steps(1))) == [(1, 1)]
    assert windows([{"step": 1}, {"step": 2, "at": "x", "step_time": 1.0}]) == []


def test_steps_that_do_not_follow_each_other_are_not_one_picture() -> None:
    resumed = [step for step in steps(9) if step["step"] not in (4, 5, 6)]

    assert shown(windows(resumed))[0] in [(7, 9)]


WINDOW = Window(first=4, last=6, began=100.0, ended=110.0)


def completions(count: int) -> list[Span]:
    return [
        Span(
            track=f"generation/{i % 8:03}",
            name=f"sample {i}",
            began=100.0 + 9 * i / count,
            ended=100.5 + 9 * i / count,
            args={"tokens": 5 + i, "versions": ["0.3", "0.4"] if i % 2 else ["0.4"]},
        )
        for i in range(count)
    ]


WORK = [
    Span(track="weights", name="busy", began=104.0, ended=105.0),
    Span(track="weights", name="load", began=104.0, ended=105.0, args={"version": "0.4"}),
    Span(track="judge", name="busy", began=101.0, ended=102.0),
    Span(track="evaluator", name="idle", began=100.0, ended=110.0),
    Span(track="actor_update", name="busy", began=90.0, ended=104.0),
    Span(track="actor_update", name="publish", began=103.0, ended=104.0, args={"version": "0.4"}),
    Span(track="actor_update", name="idle", began=104.0, ended=110.0),
    Span(track="rollout", name="busy", began=90.0, ended=120.0),
]


def test_the_widest_window_whose_completions_can_be_drawn_is_taken() -> None:
    narrow = Window(first=5, last=5, began=100.0, ended=101.0)
    few, many = completions(MAX_LANES), completions(MAX_LANES + 1)

    assert narrowed(few, [WINDOW, narrow])[0] == WINDOW
    window, inside = narrowed(many, [WINDOW, narrow])
    assert window == narrow
    assert all(span.began < 101.0 for span in inside)


def test_the_picture_says_in_words_what_it_shows() -> None:
    _, words = gantt([*WORK, *completions(40)], WINDOW)

    assert words == (
        "Steps 4 to 6: 10 s. The learner was busy for 40% of it. Half of the 40 completions took less than 0.5 s, the "
        "longest 0.5 s (sample 0, 5 tokens)."
    )


def test_parts_are_shown_in_data_order_and_those_that_do_nothing_are_not() -> None:
    picture, _ = gantt(WORK, WINDOW)

    places = [picture.find(f">{name}<") for name in ("rollout", "judge", "actor_update", "weights")]
    assert places == sorted(places)
    assert places[0] > 0
    assert ">evaluator<" not in picture


def test_publications_and_loads_are_marked_and_versions_are_named() -> None:
    picture, _ = gantt([*WORK, *completions(4)], WINDOW)

    assert picture.count('class="published"') == picture.count('class="loaded"') == 2  # above and below
    assert ">0.4</span>" in picture


def test_of_too_many_completions_some_are_drawn_and_the_page_says_so() -> None:
    picture, words = gantt(completions(5 * MAX_LANES), WINDOW)

    assert picture.count("<title>") == MAX_LANES
    assert "one in 5 of them" in words
    assert "Half of the 800 completions" in words


def test_each_completion_says_which_sample_it_is() -> None:
    picture, _ = gantt(completions(2), WINDOW)

    assert "<title>sample 1, 6 tokens, 0.5 s, version 0.3, 0.4</title>" in picture
    assert "tokens of two versions" in picture
    assert "tokens of two versions" not in gantt(completions(1), WINDOW)[0]


def test_hostile_names_stay_text() -> None:
    attack = "<script>alert(1)</script>"
    spans = [
        Span(track=attack, name="busy", began=101.0, ended=102.0),
        Span(
            track="generation/0", name=attack, began=101.0, ended=102.0, args={"tokens": attack, "versions": [attack]}
        ),
        Span(track="actor_update", name="publish", began=103.0, ended=104.0, args={"version": attack}),
    ]

    picture, _ = gantt(spans, WINDOW)

    assert "<script" not in picture


@pytest.mark.parametrize(
    ("bars", "drawn"),
    [
        ([(10.0, 20.0), (20.3, 30.0)], [(10.0, 30.0)]),
        ([(50.0, 60.0), (10.0, 20.0)], [(10.0, 20.0), (50.0, 60.0)]),
        ([(-5.0, 10.0), (990.0, 1200.0)], [(0.0, 10.0), (990.0, 1000.0)]),
        ([(10.0, 10.0)], [(10.0, 10.6)]),
        ([(10.0, 40.0), (20.0, 30.0)], [(10.0, 40.0)]),
    ],
)
def test_bars_are_cut_to_the_picture_and_those_that_would_touch_are_one(bars: Any, drawn: Any) -> None:
    assert merged(bars) == drawn


def test_a_part_with_very_many_spans_stays_small() -> None:
    spans = [
        Span(track="reward", name="busy" if i % 2 else "idle", began=100 + i / 10_000, ended=100 + (i + 1) / 10_000)
        for i in range(100_000)
    ]

    picture, _ = gantt(spans, WINDOW)

    assert len(picture) < 60_000


def test_shares_are_told_in_data_order_with_what_was_waited_for() -> None:
    shares = {
        "actor_update/busy": 0.6, "actor_update/idle": 0.4, "actor_update/blocked": 0.0,
        "actor_update/wait_for/rollout": 0.4,
        "rollout/busy": 0.7, "rollout/blocked": 0.3, "rollout/wait_for/bound": 0.2, "rollout/wait_for/end": 0.1,
        "judge/busy": 1.0,
    }  # fmt: skip

    picture, words = stage_shares(shares)

    assert words == (
        "rollout busy 70%; waited 20% for the learner: the staleness bound is reached; judge busy 100%; "
        "actor_update busy 60%; waited 40% for rollouts"
    )
    assert 'class="accent" style="width:70.0%"' in picture
    assert 'class="faint" style="width:30.0%"' in picture


# -- on the page -------------------------------------------------------------------------------------------------------


def with_timeline(run: Path) -> Path:
    """A run directory with a trace, and shares in its steps."""
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    clock = ManualClock(2000.0)
    timeline = TraceTimeline(run / TRACE, clock=clock)
    for line in (line for line in lines if line["kind"] == "step"):
        timeline.enter("rollout", "busy")
        timeline.enter("actor_update", "idle", "rollout")
        began = timeline.now()
        clock.advance(line["step_time"] - 1.0)
        timeline.record("generation/000", f"sample {line['step']}", began, tokens=12, versions=["0.1"])
        timeline.enter("actor_update", "busy")
        with timeline.span("actor_update", "publish", version=line["policy_version"]):
            clock.advance(1.0)
        line |= {"at": clock.now, **timeline.lap()}
    timeline.close()
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_page_shows_who_waits_for_whom(tmp_path: Path) -> None:
    page = Page(write_report(with_timeline(make_run(tmp_path / "run"))))

    assert len(page.charts()) == 10
    assert "Generation is the bottleneck: the learner waited 9" in page.text
    assert "Steps 6 to 8:" in page.text
    assert "Half of the 3 completions" in page.text
    assert re.search(r"actor_update busy \d+%; waited 9\d% for rollouts", page.text)


def test_a_run_from_before_there_was_a_timeline_has_a_page_without_it(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")))

    assert len(page.charts()) == 8
    assert "bottleneck" not in page.text
    assert "The run has no trace of these steps." in page.text


def test_a_trace_that_is_broken_does_not_keep_the_page_from_being_made(tmp_path: Path) -> None:
    run = with_timeline(make_run(tmp_path / "run"))
    (run / TRACE).write_bytes(b"\xff\xfe" * 5000)

    assert "The run has no trace of these steps." in Page(write_report(run)).text
