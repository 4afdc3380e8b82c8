"""`report.html`: a run on one page that needs nothing but itself.

It is made from what is in the run directory, whatever that is: a run that was killed has no summary, a run that failed
early has no steps, and the page then says so in the place where the chart would be.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from asyncflow.errors import LedgerError
from asyncflow.report.audit import Audit, audit
from asyncflow.report.bottleneck import diagnose, mean_shares
from asyncflow.report.charts import Point, Series, histogram, line_chart, number, rolling, stacked_bars
from asyncflow.report.gantt import Window, gantt, narrowed, stage_shares, windows
from asyncflow.report.style import CSS
from asyncflow.rundir import CONFIG, LEDGER, METRICS, REPORT, SUMMARY, TRACE
from asyncflow.runtime.metrics import read_metrics
from asyncflow.runtime.timeline import Span, read_trace

MAX_ROWS = 400
"""Steps in the table of numbers."""

MAX_VIOLATIONS = 20
"""Violations in the list."""
SHOWN_ALARMS = 12
"""Alarms in the head."""

TIMES = (
    ("perf/fwd_bwd_s", "forward and backward", "accent"),
    ("perf/optim_s", "optimizer", "accent-2"),
    ("perf/weight_sync_s", "commit and publish weights", "accent-3"),
    ("perf/rollout_wait_s", "waiting for rollouts", "faint"),
)
"""Where the time of a step goes: metric, name, tone."""

COLUMNS = (
    ("step", "step"),
    ("reward", "reward"),
    ("sample/staleness_mean", "staleness"),
    ("sample/staleness_max", "max"),
    ("samples", "trained"),
    ("skipped", "skipped"),
    ("completions/mean_length", "tokens each"),
    ("loss", "loss"),
    ("grad_norm", "grad norm"),
    ("clip_ratio/low", "clipped low"),
    ("clip_ratio/high", "clipped high"),
    ("ess", "ESS"),
    ("mismatch_kl", "mismatch KL"),
    ("entropy", "entropy"),
    ("rollout/generated_tok_s", "tokens/s"),
    ("step_time", "seconds"),
)
"""The table of numbers: metric and heading."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run directory holds, as far as it can be read."""

    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    weights: Sequence[Mapping[str, Any]]
    served: Sequence[Mapping[str, Any]]
    alarms: Sequence[Mapping[str, Any]]
    windows: Sequence[Window]
    """Steps whose timeline could be shown, the widest first."""
    spans: Sequence[Span]
    """What happened in the widest of them."""
    audit: Audit | None
    audit_error: str
    """Why there is no audit."""

    def series(self, key: str) -> list[Point]:
        """(step, value) of every step that measured this as a finite number."""
        return _points(self.steps, key)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from what is in the run directory and return its path.

    Raises LedgerError when the directory holds no run at all. A ledger that cannot be audited is reported on the page.
    """
    if not any((run_dir / name).is_file() for name in (CONFIG, METRICS, LEDGER, SUMMARY)):
        raise LedgerError(f"there is no run in {run_dir}: name a run directory")
    path = run_dir / REPORT
    aside = path.with_suffix(".html.part")
    aside.write_text(page(read_run(run_dir)), encoding="utf-8")
    os.replace(aside, path)
    return path


def read_run(run_dir: Path) -> RunFiles:
    """Read a run directory; what is missing or broken is empty."""
    metrics = run_dir / METRICS
    books, error = None, ""
    try:
        books = audit(run_dir)
    except LedgerError as problem:
        error = str(problem).replace(f"{run_dir}{os.sep}", "") if (run_dir / LEDGER).is_file() else "there is none."
    steps = read_metrics(metrics, "step")
    shown = windows(steps)
    return RunFiles(
        config=_json(run_dir / CONFIG),
        summary=_json(run_dir / SUMMARY),
        steps=steps,
        evals=read_metrics(metrics, "eval"),
        weights=read_metrics(metrics, "weights"),
        served=read_metrics(metrics, "served"),
        alarms=read_metrics(metrics, "alarm"),
        windows=shown,
        spans=list(
            read_trace(run_dir / TRACE, began=min(one.began for one in shown), ended=max(one.ended for one in shown))
        )
        if shown
        else [],
        audit=books,
        audit_error=error,
    )


def page(run: RunFiles) -> str:
    """The whole page."""
    name = str(run.config.get("name", "run"))
    body = [
        f"<header>{_header(run, name)}</header><main>",
        f"<section><h2>Learning</h2><div class='charts'>{_reward(run)}{_ratios(run)}</div></section>",
        f"<section><h2>Who waits for whom</h2><div class='charts'>{_shares(run)}{_timeline(run)}</div></section>",
        f"<section><h2>Staleness</h2><div class='charts'>{_staleness_histogram(run)}{_staleness(run)}</div></section>",
        f"<section><h2>Speed</h2><div class='charts'>{_times(run)}{_throughput(run)}</div></section>",
        f"<section class='account'><h2>Account of all samples</h2>{_account(run)}</section>",
        f"<section><h2>Details</h2>{_weights(run)}{_numbers(run)}{_configuration(run)}</section>",
        "</main><footer>Made by <code>asyncflow report</code> from the files in the run directory.</footer>",
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        # The page fetches nothing; this makes the browser refuse to, whatever a run wrote into it.
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        "<link rel='icon' href='data:,'>"
        f"<title>{escape(name)} · AsyncFlow</title><style>{CSS}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


# -- the head ----------------------------------------------------------------------------------------------------------


def _header(run: RunFiles, name: str) -> str:
    config, summary = run.config, run.summary
    made, planned = summary.get("steps"), config.get("steps")
    made = made if _is_number(made) else len(run.steps)
    facts = [
        str(config.get("model", "")),
        str(config.get("algorithm", "")).upper(),
        f"max_staleness {config['max_staleness']}" if "max_staleness" in config else "",
        (f"{_many(made)} of {_many(planned)} steps" if _is_number(planned) else f"{_many(made)} steps")
        + (f" in {_duration(summary['seconds'])}" if _is_number(summary.get("seconds")) else ""),
    ]
    return (
        f"<p class='eyebrow'>AsyncFlow run</p><h1>{escape(name)}</h1>"
        f"<p class='sub'>{escape(' · '.join(fact for fact in facts if fact))}</p>"
        f"{_outcome(run)}{_alarms(run)}{_accuracy(run)}{_bottleneck(run)}{_stats(run)}"
    )


def _outcome(run: RunFiles) -> str:
    outcome = str(run.summary.get("outcome", "no summary"))
    tone = {"finished": "good", "stopped": ""}.get(outcome, "bad")
    reason = run.summary.get("reason") or (
        "" if run.summary else "The run left no summary: it was killed, or it still goes on."
    )
    said = f"<p class='reason'>{escape(str(reason))}</p>" if reason else ""
    return f"<p class='status {tone}'>{escape(outcome.capitalize())}</p>{said}"


def _alarms(run: RunFiles) -> str:
    if not run.alarms:
        return ""
    lines = [f"{line.get('severity', 'warning')}: {line.get('text', '')}" for line in run.alarms]
    shown = "".join(f"<li>{escape(line)}</li>" for line in lines[:SHOWN_ALARMS])
    more = f"<li>and {_many(len(lines) - SHOWN_ALARMS)} more in {METRICS}</li>" if len(lines) > SHOWN_ALARMS else ""
    return f"<ul class='reason'>{shown}{more}</ul>"


def _accuracy(run: RunFiles) -> str:
    measured = _points(run.evals, "eval/accuracy")
    before = run.summary.get("accuracy_before")
    after = run.summary.get("accuracy_after")
    if not _is_number(before) and measured and measured[0][0] == 0:
        before = measured[0][1]
    if not _is_number(after) and len(measured) > 1:
        after = measured[-1][1]
    if not _is_number(before) and not _is_number(after):
        return "<p class='sub'>Held-out accuracy was not measured.</p>"
    sizes = [line["eval/size"] for line in run.evals if _is_number(line.get("eval/size"))]
    on = f" on {_many(sizes[-1])} problems that are never trained on" if sizes else ""
    shown = [f"{value:.3f}" if _is_number(value) else "–" for value in (before, after)]
    gain = f"<span class='gain'>{after - before:+.3f}</span>" if _is_number(before) and _is_number(after) else ""
    return (
        f"<p class='hero'><span>{shown[0]}</span><span class='arrow' aria-hidden='true'>→</span>"
        f"<span class='after'>{shown[1]}</span>{gain}</p>"
        f"<p class='hero-label'>Held-out accuracy before and after{on}</p>"
    )


def _bottleneck(run: RunFiles) -> str:
    eta, update = run.config.get("max_staleness", 0), str(_section(run.config, "weights").get("update", ""))
    found = diagnose(run.steps, max_staleness=eta if isinstance(eta, int) else 0, update=update)
    return "" if found is None else f"<p class='bottleneck'>{escape(found.text)}</p>"


def _stats(run: RunFiles) -> str:
    stats: list[tuple[str, str, str]] = []
    if (books := run.audit) is not None:
        stats.append(("Samples trained", _many(books.trained), f"of {_many(books.admitted)}"))
        stats.append(("Highest staleness", str(max(books.staleness, default=0)), f"bound {books.terms.max_staleness}"))
    if speed := _values(run, "rollout/generated_tok_s"):
        stats.append(("Generated, median", number(statistics.median(speed)), "tokens/s"))
    if seconds := _values(run, "step_time"):
        stats.append(("Step, median", number(statistics.median(seconds)), "s"))
    if shares := _time_shares(run):
        stats.append(("Learner waited", f"{shares['waiting for rollouts']:.0%}", "of its time"))
    if books is not None:
        stats.append(("Audit", "sound" if books.ok else "violated", ""))
    entries = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(unit)}</small></dd></div>"
        for name, value, unit in stats
    )
    return f"<dl class='stats'>{entries}</dl>" if stats else ""


# -- charts ------------------------------------------------------------------------------------------------------------


def _figure(title: str, says: str, *charts: str, wide: bool = False) -> str:
    return (
        f"<figure{' class=wide' if wide else ''}><figcaption><h3>{escape(title)}</h3><p>{escape(says)}</p></figcaption>"
        f"{''.join(charts)}</figure>"
    )


def _missing(title: str, what: str, *, wide: bool = False) -> str:
    return (
        f"<figure{' class=wide' if wide else ''}><figcaption><h3>{escape(title)}</h3></figcaption>"
        f"<p class='empty'>{escape(what)}</p></figure>"
    )


def _reward(run: RunFiles) -> str:
    title, rewards, accuracy = "Reward and held-out accuracy", run.series("reward"), _points(run.evals, "eval/accuracy")
    if not rewards and not accuracy:
        return _missing(title, "No step was made and nothing was evaluated.", wide=True)
    series, says = [], []
    if rewards:
        values = [y for _, y in rewards]
        width = max(3, len(rewards) // 20)
        if len(rewards) >= 4 * width:
            series.append(Series(label="reward of each step", points=rewards, tone="faint"))
            series.append(Series(label=f"mean of {width} steps", points=rolling(rewards, width), tone="ink"))
        else:
            series.append(Series(label="reward of each step", points=rewards, tone="ink"))
        head, tail = statistics.mean(values[:width]), statistics.mean(values[-width:])
        says.append(
            f"The mean reward of a step went from {number(head)} to {number(tail)} in {_many(len(rewards))} steps."
            if len(rewards) > 1
            else f"The mean reward of the one step was {number(head)}."
        )
    if accuracy:
        series.append(Series(label="held-out accuracy", points=accuracy, mark="dots"))
        first, last = accuracy[0], accuracy[-1]
        says.append(
            f"Held-out accuracy was {first[1]:.3f} at step {number(first[0])} and {last[1]:.3f} at step "
            f"{number(last[0])}."
            if len(accuracy) > 1
            else f"Held-out accuracy was {first[1]:.3f} at step {number(first[0])}."
        )
    else:
        says.append("There was no held-out evaluation.")
    words = " ".join(says)
    return _figure(title, words, line_chart(series, label=words, y_range=(0.0, 0.0)), wide=True)


def _ratios(run: RunFiles) -> str:
    """Two figures: how far the behaviour policy is from the one that is trained."""
    figures = []
    for key, title, means, y_range in (
        ("ess", "Effective sample size of the behaviour ratio", "1 means that every token counts fully", (0.0, 1.0)),
        ("mismatch_kl", "Mismatch KL", "between the engine's and the learner's policy; 0 means equal", (0.0, 0.0)),
    ):
        if not (points := run.series(key)):
            figures.append(_missing(title, "No step measured it."))
            continue
        values = [y for _, y in points]
        middle, low, high = (number(of(values)) for of in (statistics.median, min, max))
        words = f"Median {middle}, between {low} and {high}: {means}."
        chart = line_chart([Series(label=title, points=points)], label=words, y_range=y_range, legend=False)
        figures.append(_figure(title, words, chart))
    return "".join(figures)


def _staleness_histogram(run: RunFiles) -> str:
    title = "Staleness of the trained samples"
    if run.audit is None:
        return _missing(title, f"The ledger cannot be read: {run.audit_error}")
    if not run.audit.staleness:
        return _missing(title, "No sample was trained.")
    bound, counts = run.audit.terms.max_staleness, run.audit.staleness
    parts = ", ".join(f"{count / run.audit.trained:.0%} at {value}" for value, count in counts.items())
    above = sum(count for value, count in counts.items() if value > bound)
    words = f"Policy versions between a sample's oldest token and its step: {parts}. " + (
        f"{_many(above)} samples are above the bound of {bound}." if above else f"None is above the bound of {bound}."
    )
    return _figure(title, words, histogram(counts, bound=bound, label=words))


def _staleness(run: RunFiles) -> str:
    title, means, peaks = "Staleness per step", run.series("sample/staleness_mean"), run.series("sample/staleness_max")
    if not means:
        return _missing(title, "No step measured it.")
    average = statistics.mean(y for _, y in means)
    words = f"On average {number(average)} policy versions"
    words += f", at most {number(max(y for _, y in peaks))}." if peaks else "."
    series = [Series(label="mean", points=means)]
    if peaks:
        series.insert(0, Series(label="max", points=peaks, tone="muted"))
    bound = run.config.get("max_staleness", run.audit.terms.max_staleness if run.audit else None)
    line = (float(bound), f"bound {bound}") if _is_number(bound) else None
    return _figure(title, words, line_chart(series, label=words, y_range=(0.0, 1.0), bound=line))


def _times(run: RunFiles) -> str:
    title, shares = "Where the learner's time went", _time_shares(run)
    if not shares:
        return _missing(title, "No step was timed.")
    words = ", ".join(f"{share:.0%} {name}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
    words = f"{words[0].upper()}{words[1:]}. Seconds of each step."
    timed = {step for step, _ in run.series(TIMES[0][0])}
    layers = [(name, tone, [p for p in run.series(key) if p[0] in timed]) for key, name, tone in TIMES]
    complete = [layer for layer in layers if len(layer[2]) == len(timed)]
    return _figure(title, words, stacked_bars(complete, label=words))


def _shares(run: RunFiles) -> str:
    title, shares = "Time of each part", mean_shares(run.steps[1:] or run.steps)
    if not any(shares.values()):
        return _missing(title, "No step recorded what each part did.", wide=True)
    picture, words = stage_shares(shares)
    says = "All steps after the first one. Coloured: it computed. Grey: it had work and could not go on."
    return _figure(title, says, f"<div role='img' aria-label='{escape(words)}'>{picture}</div>", wide=True)


def _timeline(run: RunFiles) -> str:
    title = "A few steps, and the long tail of their completions"
    if not run.spans:
        return _missing(title, "The run has no trace of these steps.", wide=True)
    window, spans = narrowed(run.spans, run.windows)
    picture, words = gantt(spans, window)
    note = f"<p class='note'>The whole run is in <code>{TRACE}</code>: open it in Perfetto or chrome://tracing.</p>"
    return _figure(title, words, picture, note, wide=True)


def _throughput(run: RunFiles) -> str:
    title, charts, says = "Throughput", [], []
    for key, unit in (("rollout/generated_tok_s", "tokens/s"), ("rollout/completions_s", "completions/s")):
        if points := run.series(key):
            words = f"{number(statistics.median(y for _, y in points))} {unit}"
            says.append(words)
            series = [Series(label=unit, points=points)]
            chart = line_chart(series, label=f"Median {words}", y_range=(0.0, 0.0), short=True, legend=False)
            charts.append(f"<h4>{unit}</h4>{chart}")
    if not charts:
        return _missing(title, "No step measured it.")
    return _figure(title, f"In the median step {' and '.join(says)}.", *charts)


# -- the account -------------------------------------------------------------------------------------------------------


def _account(run: RunFiles) -> str:
    if (books := run.audit) is None:
        return f"<p class='empty'>The ledger cannot be read: {escape(run.audit_error)}</p>"
    terms = [
        (books.trained, "trained", "+"),
        (sum(books.dropped.values()), "dropped", "+"),
        (books.quarantined, "quarantined", "+"),
        (books.open, "open", ""),
    ]
    sign = "=" if books.balanced else "≠"
    equation = f"<span><b>{_many(books.admitted)}</b> <i>admitted</i></span><span class='op'>{sign}</span>" + "".join(
        f"<span><b>{_many(count)}</b> <i>{name}</i></span>" + (f"<span class='op'>{op}</span>" if op else "")
        for count, name, op in terms
    )
    sentences = list(books.violations[:MAX_VIOLATIONS])
    if (more := len(books.violations) - len(sentences)) > 0:
        sentences.append(f"and {_many(more)} more, which `asyncflow audit` lists")
    violations = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    lines = [("trained", "in the weights", books.trained)]
    lines += [("dropped", reason, count) for reason, count in books.dropped.items()]
    lines += [("quarantined", reason, count) for reason, count in books.quarantine_reasons.items()]
    lines += [("open", "not ended when the ledger did", books.open)]
    rows = "".join(
        f"<tr><td>{escape(end)}</td><td class='why'>{escape(reason)}</td><td class='n'>{_many(count)}</td>"
        f"<td class='n'>{_share(count, books.admitted)}</td></tr>"
        for end, reason, count in lines
    )
    spans = (
        f" {_many(books.spanning)} trained samples have tokens of more than one policy version (up to "
        f"{books.max_span} apart)."
        if books.spanning
        else ""
    )
    return (
        f"<p class='equation'>{equation}</p>"
        f"<p class='verdict {'accent' if books.ok else 'bad'}'>{'✓' if books.ok else '✗'} {escape(books.verdict)}</p>"
        + (f"<ul class='violations'>{violations}</ul>" if violations else "")
        + f"<p class='note'>Counted again from the ledger's events, independently of the store.{spans}</p>"
        "<table><thead><tr><th>end</th><th>reason</th><th class='n'>samples</th><th class='n'>share</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


# -- details -----------------------------------------------------------------------------------------------------------


def _weights(run: RunFiles) -> str:
    published = {str(line.get("version")): str(line.get("digest")) for line in run.weights}
    wrong = [line for line in run.served if published.get(str(line.get("version"))) != str(line.get("digest"))]
    facts = [("published versions", _many(len(run.weights)))]
    for name, lines, key in (
        ("time to publish, median", run.weights, "publish_s"),
        ("time to load into an engine, median", run.served, "update_s"),
    ):
        if seconds := [float(line[key]) for line in lines if _is_number(line.get(key))]:
            facts.append((name, f"{number(statistics.median(seconds))} s"))
    if run.served:
        facts.append(
            (
                "served digests",
                f"{_many(len(wrong))} of {_many(len(run.served))} differ from what was published"
                if wrong
                else f"all {_many(len(run.served))} equal what was published",
            )
        )
    if run.summary.get("digest"):
        facts.append(("last digest", str(run.summary["digest"])))
    if run.summary.get("weights"):
        facts.append(("final weights", f"{run.summary['weights']}/ in the run directory (Hugging Face format)"))
    rows = "".join(f"<tr><td>{escape(name)}</td><td class='why'>{escape(value)}</td></tr>" for name, value in facts)
    return _details("Weights", f"<table><tbody>{rows}</tbody></table>")


def _numbers(run: RunFiles) -> str:
    if not run.steps:
        return ""
    every = math.ceil(len(run.steps) / MAX_ROWS)
    lines = list(run.steps[::every])
    columns = [(key, heading) for key, heading in COLUMNS if any(_is_number(line.get(key)) for line in lines)]
    head = "".join(f"<th class='n' scope='col'>{escape(heading)}</th>" for _, heading in columns)
    rows = "".join(
        "<tr>"
        + "".join(f"<td class='n'>{number(line[key]) if _is_number(line.get(key)) else '–'}</td>" for key, _ in columns)
        + "</tr>"
        for line in lines
    )
    caption = f"<caption>Every {every}th step</caption>" if every > 1 else ""
    return _details(
        "Numbers of each step",
        f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>",
        classes="numbers",
    )


def _configuration(run: RunFiles) -> str:
    if not run.config:
        return "<p class='empty'>The resolved configuration is missing.</p>"
    lines = [(key, json.dumps(value, ensure_ascii=False)) for key, value in _flat(run.config)]
    rows = "".join(
        f"<tr><td class='key-name'><code>{escape(key)}</code></td><td><code>{escape(value)}</code></td></tr>"
        for key, value in lines
    )
    return _details("Resolved configuration", f"<table><tbody>{rows}</tbody></table>")


def _details(title: str, content: str, *, classes: str = "") -> str:
    region = f"<div class='scroll {classes}' tabindex='0' role='region' aria-label='{escape(title)}'>{content}</div>"
    return f"<details><summary>{escape(title)}</summary>{region}</details>"


# -- values ------------------------------------------------------------------------------------------------------------


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested sections as dotted keys."""
    lines: list[tuple[str, Any]] = []
    for key, value in values.items():
        lines += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
    return lines


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    points = [(line.get("step"), line.get(key)) for line in lines]
    return [(float(x), float(y)) for x, y in points if _is_number(x) and _is_number(y)]


def _values(run: RunFiles, key: str) -> list[float]:
    return [y for _, y in run.series(key)]


def _time_shares(run: RunFiles) -> dict[str, float]:
    """Share of the measured time of all steps by what it was spent on; empty when nothing was measured."""
    sums = {name: sum(_values(run, key)) for key, name, _ in TIMES}
    total = sum(sums.values())
    return {name: seconds / total for name, seconds in sums.items()} if total > 0 else {}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _many(count: Any) -> str:
    return f"{count:,}" if isinstance(count, int) else str(count)


def _share(count: int, whole: int) -> str:
    return f"{count / whole:.1%}" if whole else "–"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{seconds:.1f} s"
