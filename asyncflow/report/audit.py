"""The account of a run, done again from its ledger.

The audit reads events and nothing else. It keeps its own small books instead of asking the store's table, so that a
mistake in the table's arithmetic shows up here as a violation and not as agreement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from asyncflow.errors import LedgerError
from asyncflow.rundir import LEDGER
from asyncflow.store.columns import TOKEN_VERSIONS
from asyncflow.store.events import (
    Acked,
    Admitted,
    Amended,
    Checkpointed,
    Committed,
    Dropped,
    Leased,
    Opened,
    Quarantined,
    Requeued,
    Restored,
    Resumed,
    Returned,
    Served,
)
from asyncflow.store.journal import LedgerReader, Record
from asyncflow.store.schema import Schema
from asyncflow.types import PolicyVersion

MAX_NAMED = 10
"""How many ids one sentence names."""

SKIPPED = "zero_variance_skipped"
"""Reason under which a step's skipped samples are dropped."""


@dataclass(frozen=True, kw_only=True)
class StepAccount:
    """What one step consumed."""

    version: PolicyVersion
    """That the step was published as."""
    trained: int
    skipped: int
    staleness_mean: float
    """Over the trained samples; 0 when there are none."""
    staleness_max: int


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The account of all samples of a run, and everything that is wrong with it."""

    terms: Opened
    """Those that hold at the end."""
    admitted: int
    trained: int
    dropped: Mapping[str, int]
    """Samples by reason."""
    quarantined: int
    quarantine_reasons: Mapping[str, int]
    """Samples by reason."""
    open: int
    """Samples whose life had not ended when the ledger did."""
    staleness: Mapping[int, int]
    """Staleness in policy versions → trained samples, in ascending order."""
    steps: tuple[StepAccount, ...]
    spanning: int
    """Trained samples with tokens of more than one policy version."""
    max_span: int
    """Most versions between the oldest and the newest token of one trained sample."""
    learner: PolicyVersion
    """Of the last step."""
    resumed: tuple[PolicyVersion, ...]
    """Where the run went on after it had ended, in order."""
    requeued: int
    """Samples that were generated again because they were too old. Each counts once for each time."""
    masked: int
    """Trained samples of which some tokens were too old for the loss; their staleness is that of the others."""
    restored: int
    """Samples that were put back from quarantine. Each counts once for each time."""
    taken_back: int
    """Samples that steps had consumed and that were consumed again, because a checkpoint before these steps was
    resumed. Each counts once for each time."""
    highest_bound: int
    """Highest `max_staleness` that ever held."""
    events: int
    """How many the ledger has: the number of the last one."""
    violations: tuple[str, ...]
    """One sentence for each broken promise."""

    @property
    def ok(self) -> bool:
        return not self.violations

    @property
    def balanced(self) -> bool:
        return self.admitted == self.trained + sum(self.dropped.values()) + self.quarantined + self.open

    @property
    def equation(self) -> str:
        """The balance as one line."""
        sign = "=" if self.balanced else "≠"
        dropped = sum(self.dropped.values())
        return (
            f"admitted {self.admitted:,} {sign} trained {self.trained:,} + dropped {dropped:,} "
            f"+ quarantined {self.quarantined:,} + open {self.open:,}"
        )

    @property
    def verdict(self) -> str:
        """One sentence about everything."""
        if self.violations:
            many = len(self.violations)
            return f"{many} violation{'s' if many > 1 else ''} found: this run did not keep its promises."
        bound = self.terms.max_staleness
        if self.highest_bound != bound:
            return "The account balances and no trained sample is staler than the bound that held for it."
        return f"The account balances and no trained sample is staler than max_staleness = {bound}."


def audit(run_dir: Path) -> Audit:
    """Do the account of a run from `run_dir/ledger.sqlite`, also while it goes on.

    Raises LedgerError when the ledger is missing, newer than this program, or cannot be read to its end.
    """
    path = run_dir / LEDGER
    with LedgerReader(path) as ledger:
        records = ledger.records()
        first = next(records, None)
        if first is None or not isinstance(first.event, Opened):
            raise LedgerError(
                f"{path} does not begin with the terms of a run: it holds no run, or its beginning is lost"
            )
        books = _Books(first.event, ledger.schema)
        for record in records:
            try:
                books.enter(record)
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                raise LedgerError(f"{path}: event {record.lsn} ({record.event.kind}) makes no sense: {error}") from None
        return books.close()


@dataclass(slots=True)
class _Sample:
    """What the audit remembers of a sample."""

    group: int
    end: str = ""
    """trained, dropped or quarantined; empty while it is open."""
    versions: tuple[PolicyVersion, PolicyVersion] | None = None
    """Of its oldest and newest token."""
    has_response: bool = False
    leases: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    """Why it is in quarantine."""


class _Books:
    def __init__(self, terms: Opened, schema: Schema) -> None:
        self.terms = terms
        self.train = schema.train.name
        self.response = schema.writes[schema.generate.name]
        """Bits of the columns that make a sample a completion."""
        self.version_bit = schema.mask({TOKEN_VERSIONS} & schema.columns.keys())
        self.samples: dict[int, _Sample] = {}
        self.groups: dict[int, set[int]] = {}
        """Open groups → their open samples."""
        self.stages: dict[int, str] = {}
        """Lease → stage."""
        self.bounds: dict[int, int] = {}
        """Lease → bound when it was given."""
        self.consumed: dict[int, tuple[Committed, dict[int, int]]] = {}
        """Step that can be taken back → its event, and the staleness of what it trained."""
        self.events = 1
        self.resumed: list[PolicyVersion] = []
        self.taken_back = self.requeued = self.restored = self.masked = 0
        self.highest_bound = terms.max_staleness
        self.learner = PolicyVersion(n=0)
        self.served: dict[str, PolicyVersion] = {}
        self.admitted = self.trained = self.spanning = self.max_span = 0
        self.dropped: Counter[str] = Counter()
        self.quarantined: Counter[str] = Counter()
        self.staleness: Counter[int] = Counter()
        self.steps: list[StepAccount] = []
        self.violations: list[str] = []
        self.crowded = False
        """Too much was admitted for the step under way; saying so once is enough."""
        self._entries: dict[type, Callable[[int, Any], None]] = {
            Opened: self._opened,
            Admitted: self._admitted,
            Leased: self._leased,
            Acked: self._acked,
            Returned: self._returned,
            Committed: self._committed,
            Dropped: self._dropped,
            Quarantined: self._quarantined,
            Served: self._served,
            Amended: self._amended,
            Restored: self._restored,
            Requeued: self._requeued,
            Checkpointed: self._checkpointed,
            Resumed: self._resumed,
        }

    def enter(self, record: Record) -> None:
        """Raises TypeError and the like for an event whose values are not what they should be."""
        for name in ("rows", "trained", "skipped"):
            ids = getattr(record.event, name, ())
            if not isinstance(ids, tuple) or any(type(i) is not int for i in ids):
                raise TypeError(f"{name} is not a list of sample ids")
        self.events = record.lsn
        entry = self._entries.get(type(record.event))
        if entry is not None:
            entry(record.lsn, record.event)

    def close(self) -> Audit:
        result = Audit(
            terms=self.terms,
            admitted=self.admitted,
            trained=self.trained,
            dropped={reason: count for reason, count in self.dropped.most_common() if count},
            quarantined=self.quarantined.total(),
            quarantine_reasons={reason: count for reason, count in self.quarantined.most_common() if count},
            open=sum(not sample.end for sample in self.samples.values()),
            staleness=dict(sorted(self.staleness.items())),
            steps=tuple(self.steps),
            spanning=self.spanning,
            max_span=self.max_span,
            learner=self.learner,
            resumed=tuple(self.resumed),
            requeued=self.requeued,
            masked=self.masked,
            restored=self.restored,
            taken_back=self.taken_back,
            highest_bound=self.highest_bound,
            events=self.events,
            violations=(),
        )
        if not result.balanced:
            self.violations.insert(0, f"the account does not balance: {result.equation}")
        return replace(result, violations=tuple(self.violations))

    # -- events --------------------------------------------------------------------------------------------------------

    def _opened(self, lsn: int, _: Opened) -> None:
        self._object(f"event {lsn} opens the run a second time")

    def _admitted(self, lsn: int, event: Admitted) -> None:
        size = self.terms.num_generations
        groups = range(event.first_group, event.first_group + len(event.prompt_tokens))
        ids = range(event.first_sample, event.first_sample + len(groups) * size)
        if reused := [i for i in ids if i in self.samples]:
            self._object(f"event {lsn} admits {_named(reused)} again: ids must never be reused")
        for offset, sample_id in enumerate(ids):
            group = groups[offset // size]
            self.samples[sample_id] = _Sample(group=group)
            self.groups.setdefault(group, set()).add(sample_id)
        if (brought := event.samples) is not None:
            self._append(ids, brought.columns, brought.oldest, brought.newest)
        self.admitted += len(ids)
        self._check_room(lsn)

    def _check_room(self, lsn: int) -> None:
        """Not more steps may be open than the bound leaves between the slowest engine and the learner."""
        if not self.served:
            self._object(f"event {lsn} admits samples while no engine serves")
            return
        slowest = min(version.n for version in self.served.values())
        steps = self.terms.max_staleness + 1 - max(0, self.learner.n - slowest)
        places = len(self.groups) * self.terms.num_generations
        if places > steps * self.terms.train_batch_size and not self.crowded:
            self.crowded = True
            self._object(
                f"event {lsn} admits beyond the bound: {places} places are open, "
                f"{max(0, steps) * self.terms.train_batch_size} are allowed"
            )

    def _leased(self, lsn: int, event: Leased) -> None:
        self.stages[event.lease_id] = event.stage
        self.bounds[event.lease_id] = self.terms.max_staleness
        for sample_id in self._open(lsn, event.kind, event.rows):
            leases = self.samples[sample_id].leases
            if event.stage in leases:
                self._object(
                    f"event {lsn} leases sample {sample_id} to {event.stage}, whose lease {leases[event.stage]} has it"
                )
            leases[event.stage] = event.lease_id

    def _acked(self, lsn: int, event: Acked) -> None:
        self._release(lsn, event)
        self._append(event.rows, event.columns, event.oldest, event.newest)

    def _append(
        self, rows: Sequence[int], columns: int, oldests: Sequence[int | None], newests: Sequence[int | None]
    ) -> None:
        """Samples have more columns now."""
        for index, sample_id in enumerate(rows):
            sample = self.samples.get(sample_id)
            if sample is None:
                continue
            sample.has_response |= columns & self.response == self.response
            if not columns & self.version_bit:
                continue
            oldest, newest = oldests[index], newests[index]
            if oldest is None or newest is None:
                continue
            sample.versions = span = PolicyVersion.unpack(oldest), PolicyVersion.unpack(newest)
            if span[0] > span[1]:
                self._object(f"the token versions of sample {sample_id} span from {span[0]} back to {span[1]}")
            if span[1].n > self.learner.n:
                self._object(
                    f"the token versions of sample {sample_id} reach {span[1]}, before anything after {self.learner} "
                    "was trained"
                )

    def _returned(self, lsn: int, event: Returned) -> None:
        self._release(lsn, event)

    def _committed(self, lsn: int, event: Committed) -> None:
        version = PolicyVersion.unpack(event.version)
        step = f"step {len(self.steps) + 1} (version {version})"
        if (version.incarnation, version.n) != (self.learner.incarnation, self.learner.n + 1):
            self._object(f"{step} does not follow on version {self.learner}: version numbers must be consecutive")
        rows = [*event.trained, *event.skipped]
        if twice := [i for i, times in Counter(event.trained).items() if times > 1 or self._ended(i) == "trained"]:
            self._object(f"{step} trains {_named(twice)}, which had been trained already")
        self._check_whole_step(step, rows)
        self._check_trainable(step, event.trained)
        masked = self._check_masked(step, event)
        ages = {i: self.learner.n - masked[i] if i in masked else self._age(i) for i in event.trained}
        bounds = {i: self._bound(i) for i in event.trained}
        if late := {i: age for i, age in ages.items() if age > bounds[i]}:
            listed = _listed([f"{i} (staleness {age})" for i, age in late.items()])
            self._object(f"{step} trains above the bound of {max(bounds[i] for i in late)}: sample {listed}")
        self._end(lsn, event.kind, event.trained, "trained")
        self._end(lsn, event.kind, event.skipped, "dropped")
        self.trained += len(event.trained)
        self.masked += len(masked)
        if event.skipped:
            self.dropped[SKIPPED] += len(event.skipped)
        self.staleness.update(ages[i] for i in event.trained)
        for sample_id in event.trained:
            self._count_span(sample_id)
        self.steps.append(
            StepAccount(
                version=version,
                trained=len(event.trained),
                skipped=len(event.skipped),
                staleness_mean=sum(ages.values()) / len(ages) if ages else 0.0,
                staleness_max=max(ages.values(), default=0),
            )
        )
        self.learner, self.crowded = version, False
        if self.terms.resumable:
            self.consumed[version.n] = event, ages

    def _check_masked(self, step: str, event: Committed) -> dict[int, int]:
        """Trained sample → version of its oldest token in the loss, of those that have older ones: it must have it."""
        masked = {i: PolicyVersion.unpack(version).n for i, version in event.masked}
        if masked and self.terms.late_samples != "mask":
            self._object(f"{step} masks tokens, and late_samples is {self.terms.late_samples}")
        for sample_id, oldest in masked.items():
            sample = self.samples.get(sample_id)
            span = sample.versions if sample else None
            if sample_id not in event.trained or span is None or not span[0].n <= oldest <= span[1].n:
                self._object(f"{step} has nothing of version {oldest} in sample {sample_id}, and says it is its oldest")
        return masked

    def _check_whole_step(self, step: str, rows: Sequence[int]) -> None:
        groups = {self.samples[i].group for i in rows if i in self.samples}
        if missing := sorted(set().union(*(self.groups.get(group, set()) for group in groups)).difference(rows)):
            self._object(f"{step} cuts a group: it leaves out {_named(missing)}")
        places = len(groups) * self.terms.num_generations
        if places != self.terms.train_batch_size:
            self._object(
                f"{step} is not one whole step: it consumes {places} places, not {self.terms.train_batch_size}"
            )

    def _check_trainable(self, step: str, rows: Sequence[int]) -> None:
        known = {i: self.samples[i] for i in rows if i in self.samples}
        if empty := [i for i, sample in known.items() if not sample.has_response]:
            self._object(f"{step} trains {_named(empty)} without a response")
        if free := [i for i, sample in known.items() if not sample.leases and not sample.end]:
            self._object(f"{step} trains {_named(free)} without a lease")

    def _dropped(self, lsn: int, event: Dropped) -> None:
        self.dropped[event.reason] += len(event.rows)
        self._end(lsn, event.kind, event.rows, "dropped")

    def _quarantined(self, lsn: int, event: Quarantined) -> None:
        self.quarantined[event.reason] += len(event.rows)
        for sample_id in event.rows:
            if (sample := self.samples.get(sample_id)) is not None:
                sample.reason = event.reason
        self._end(lsn, event.kind, event.rows, "quarantined")

    def _restored(self, lsn: int, event: Restored) -> None:
        if foreign := [i for i in event.rows if self._ended(i) != "quarantined"]:
            self._object(f"event {lsn} puts {_named(foreign)} back, which was not in quarantine")
        for sample_id in sorted(set(event.rows).difference(foreign)):
            sample = self.samples[sample_id]
            if sample.group not in self.groups:
                self._object(f"event {lsn} puts {_named([sample_id])} back into a group that had ended")
            self.quarantined[sample.reason] -= 1
            sample.end, sample.reason = "", ""
            self.groups.setdefault(sample.group, set()).add(sample_id)
            self.restored += 1

    def _requeued(self, lsn: int, event: Requeued) -> None:
        if self.terms.late_samples != "requeue":
            self._object(
                f"event {lsn} generates {_named(event.rows)} again, and late_samples is {self.terms.late_samples}"
            )
        rows = self._open(lsn, event.kind, event.rows)
        if young := [i for i in rows if self._age(i) <= self.terms.max_staleness]:
            self._object(f"event {lsn} generates {_named(young)} again, which was not too old")
        for sample_id in rows:
            sample = self.samples[sample_id]
            sample.versions, sample.has_response = None, False
            sample.leases.clear()
            self.requeued += 1

    def _served(self, lsn: int, event: Served) -> None:
        if event.version is None:
            self.served.pop(event.engine, None)
            return
        version = self.served[event.engine] = PolicyVersion.unpack(event.version)
        if version.n > self.learner.n:
            self._object(f"event {lsn}: engine {event.engine} serves {version}, which nothing was trained for yet")

    def _amended(self, _: int, event: Amended) -> None:
        terms = msgspec.structs.replace(self.terms, max_staleness=event.max_staleness, last_version=event.last_version)
        self.terms = terms
        self.highest_bound = max(self.highest_bound, event.max_staleness)

    def _checkpointed(self, lsn: int, event: Checkpointed) -> None:
        version, oldest = PolicyVersion.unpack(event.version), PolicyVersion.unpack(event.oldest)
        if version.n > self.learner.n or oldest.n > version.n:
            self._object(f"event {lsn} names a checkpoint of {version}, which nothing was trained for yet")
        self.consumed = {n: step for n, step in self.consumed.items() if n > oldest.n}

    def _resumed(self, lsn: int, event: Resumed) -> None:
        version = PolicyVersion.unpack(event.version)
        if version.incarnation != self.learner.incarnation + 1 or version.n > self.learner.n:
            self._object(f"event {lsn} resumes at {version} after {self.learner}: an incarnation must be the next one")
        if lost := [n for n in range(version.n + 1, self.learner.n + 1) if n not in self.consumed]:
            self._object(f"event {lsn} resumes at {version}, and step {_listed([str(n) for n in lost])} was let go of")
        for n in sorted((n for n in self.consumed if n > version.n), reverse=True):
            self._take_back(*self.consumed.pop(n))
        for sample_id, sample in self.samples.items():
            if sample.end not in ("", "quarantined"):
                continue
            if not sample.end:
                self.groups.setdefault(sample.group, set()).add(sample_id)
            sample.leases.clear()
            if sample.versions is not None and sample.versions[1].n > version.n:
                sample.versions, sample.has_response = None, False  # it is generated again
        self.groups = dict(sorted(self.groups.items()))
        self.served.clear()
        self.resumed.append(version)
        self.learner, self.crowded = version, True  # more is open than is admitted at once; that is no admission

    def _take_back(self, event: Committed, ages: Mapping[int, int]) -> None:
        """Undo the last step in the books."""
        self.steps.pop()
        self.trained -= len(event.trained)
        if event.skipped:
            self.dropped[SKIPPED] -= len(event.skipped)
        self.staleness = self.staleness - Counter(ages.values())
        self.masked -= len(event.masked)
        for sample_id in event.trained:
            self.spanning -= self._spans(sample_id)
        for sample_id in (*event.trained, *event.skipped):
            self.samples[sample_id].end = ""
        self.taken_back += len(event.trained) + len(event.skipped)

    # -- books ---------------------------------------------------------------------------------------------------------

    def _object(self, sentence: str) -> None:
        self.violations.append(sentence)

    def _ended(self, sample_id: int) -> str:
        sample = self.samples.get(sample_id)
        return sample.end if sample else ""

    def _age(self, sample_id: int) -> int:
        """Learner version before the step minus that of the oldest token."""
        sample = self.samples.get(sample_id)
        return self.learner.n - sample.versions[0].n if sample and sample.versions else 0

    def _bound(self, sample_id: int) -> int:
        """What held when the sample was leased to be trained."""
        sample = self.samples.get(sample_id)
        lease_id = sample.leases.get(self.train) if sample else None
        return self.terms.max_staleness if lease_id is None else self.bounds[lease_id]

    def _spans(self, sample_id: int) -> bool:
        sample = self.samples.get(sample_id)
        return bool(sample and sample.versions and sample.versions[0] != sample.versions[1])

    def _count_span(self, sample_id: int) -> None:
        sample = self.samples.get(sample_id)
        if sample and sample.versions and self._spans(sample_id):
            self.spanning += 1
            self.max_span = max(self.max_span, sample.versions[1].n - sample.versions[0].n)

    def _open(self, lsn: int, kind: str, rows: Iterable[int]) -> list[int]:
        """Those rows that are open; the others are objected to."""
        rows = list(rows)
        if unknown := [i for i in rows if i not in self.samples]:
            self._object(f"event {lsn} ({kind}) names {_named(unknown)}, which was never admitted")
        if ended := [i for i in rows if self._ended(i)]:
            states = ", ".join(sorted({self._ended(i) for i in ended}))
            self._object(f"event {lsn} ({kind}) names {_named(ended)}, which had ended already ({states})")
        return [i for i in dict.fromkeys(rows) if i in self.samples and not self._ended(i)]

    def _release(self, lsn: int, event: Acked | Returned) -> None:
        stage = self.stages.get(event.lease_id, "")
        rows = self._open(lsn, event.kind, event.rows)
        if foreign := [i for i in rows if self.samples[i].leases.get(stage) != event.lease_id]:
            self._object(
                f"event {lsn} ({event.kind}) names {_named(foreign)}, which lease {event.lease_id} did not have"
            )
        for sample_id in rows:
            self.samples[sample_id].leases.pop(stage, None)

    def _end(self, lsn: int, kind: str, rows: Sequence[int], end: str) -> None:
        for sample_id in self._open(lsn, kind, rows):
            sample = self.samples[sample_id]
            sample.end = end
            members = self.groups[sample.group]
            members.discard(sample_id)
            if not members:
                del self.groups[sample.group]


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - MAX_NAMED:,} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more


def _named(sample_ids: Sequence[int]) -> str:
    return f"sample {_listed([str(i) for i in sample_ids])}"


# -- for the terminal --------------------------------------------------------------------------------------------------

BAR = 40
"""Characters of the longest bar."""


def render(audit: Audit) -> str:
    """The audit as text: the balance, what was lost and why, the staleness histogram with its bound, the verdict."""
    parts = [audit.equation, *_reasons(audit), "", *_histogram(audit), "", _steps(audit), ""]
    if audit.violations:
        parts += [*(f"✗ {_plain(sentence)}" for sentence in audit.violations), ""]
    parts.append(f"{'✓' if audit.ok else '✗'} {audit.verdict}")
    return "\n".join(parts)


def _reasons(audit: Audit) -> list[str]:
    lines = [("dropped", reason, count) for reason, count in audit.dropped.items()]
    lines += [("quarantined", reason, count) for reason, count in audit.quarantine_reasons.items()]
    width = max((len(f"{count:,}") for _, _, count in lines), default=0)
    return [f"  {end:<11} {count:>{width},}  {_plain(reason)}" for end, reason, count in lines]


def _histogram(audit: Audit) -> list[str]:
    bound, most = audit.terms.max_staleness, max(audit.staleness.values(), default=0)
    lines = [f"Staleness of the {audit.trained:,} trained samples, in policy versions (max_staleness = {bound})"]
    values = range(min([0, *audit.staleness]), max([bound, *audit.staleness]) + 1)
    counts = {value: audit.staleness.get(value, 0) for value in values}
    label = max(len(str(value)) for value in values)
    number = max(len(f"{count:,}") for count in counts.values())
    for value, count in counts.items():
        share = f"{count / audit.trained:6.1%}" if audit.trained else ""
        lines.append(f"  {value:>{label}} │{_bar(count, most):<{BAR}} {count:>{number},} {share}".rstrip())
        if value == bound:
            lines.append(f"  {'':>{label}} ┝{'╌' * (BAR - 6)} bound")
    return lines


def _bar(count: int, most: int) -> str:
    """A bar in eighths of a character; whatever is not zero can be seen."""
    eighths = max(1, round(count / most * BAR * 8)) if count else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _steps(audit: Audit) -> str:
    terms = audit.terms
    line = f"{len(audit.steps):,} steps of {terms.train_batch_size} places, groups of {terms.num_generations}"
    if audit.resumed:
        times = f"{len(audit.resumed)} times" if len(audit.resumed) > 1 else "once"
        line += f"; resumed {times}, {audit.taken_back:,} samples taken back and consumed again"
    for count, what in (
        (audit.requeued, "generated again because they were too old"),
        (audit.masked, "trained without tokens that were too old"),
        (audit.restored, "put back from quarantine"),
    ):
        line += f"; {count:,} samples {what}" if count else ""
    if audit.spanning:
        line += f"; {audit.spanning:,} trained samples span policy versions, at most {audit.max_span}"
    return line


def _plain(text: str) -> str:
    """Text from elsewhere on one line, without characters that could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
