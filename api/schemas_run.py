"""What is asked of one run, and what is answered."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from asyncflow.report.bottleneck import Bottleneck
from asyncflow.report.queue import Queue
from asyncflow.report.samples import Brief, Whole


def moment(at: float) -> str:
    """A Unix time as RFC 3339, UTC, with milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Request(BaseModel):
    """Base of what clients send: unknown keys are refused, and so is text where a number belongs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True)


class Reply(BaseModel):
    """Base of what they are answered. What stands below a field is in the specification as well."""

    model_config = ConfigDict(use_attribute_docstrings=True)


# -- the queue ---------------------------------------------------------------------------------------------------------


class AccountReply(Reply):
    """`admitted == trained + dropped + quarantined + open` always."""

    admitted: int
    trained: int
    dropped: dict[str, int]
    quarantined: int
    open: int
    requeued: int
    masked: int
    restored: int


class StageReply(Reply):
    """The samples at one stage."""

    name: str
    role: str
    ready: int
    leased: int
    oldest_age_seconds: float | None
    in_per_second: float
    out_per_second: float
    time_to_empty_seconds: float | None
    """None: never, at these rates."""


class LeaseSeen(Reply):
    id: int
    stage: str
    worker: str
    samples: int
    seconds: float | None


class StalenessReply(Reply):
    """Staleness in policy versions → samples."""

    in_flight: dict[str, int]
    in_queue: dict[str, int]
    at_training: dict[str, int]


class HistoryReply(Reply):
    """Staleness at training, step by step."""

    step: list[int]
    histogram: list[dict[str, int]]


class BottleneckReply(Reply):
    stage: str | None
    text: str


class QueueReply(Reply):
    object: Literal["queue"] = "queue"
    live: bool
    at: str
    max_staleness: int
    learner: str
    served: dict[str, str]
    oldest: str | None
    counts: AccountReply
    states: dict[str, int]
    stages: list[StageReply]
    leases: list[LeaseSeen]
    staleness: StalenessReply
    history: HistoryReply | None
    bytes: int
    capacity: int
    bottleneck: BottleneckReply | None

    @classmethod
    def of(cls, queue: Queue, *, live: bool, bottleneck: Bottleneck | None, history: bool = True) -> QueueReply:
        counts, staleness = queue.counts, queue.staleness
        return cls(
            live=live,
            at=moment(queue.at),
            max_staleness=queue.max_staleness,
            learner=str(queue.learner),
            served={engine: str(version) for engine, version in queue.served.items()},
            oldest=None if queue.oldest is None else str(queue.oldest),
            counts=AccountReply(
                admitted=counts.admitted,
                trained=counts.trained,
                dropped=dict(counts.dropped),
                quarantined=counts.quarantined,
                open=counts.open,
                requeued=counts.requeued,
                masked=counts.masked,
                restored=counts.restored,
            ),
            states=dict(queue.states),
            stages=[StageReply.model_validate(stage, from_attributes=True) for stage in queue.stages],
            leases=[
                LeaseSeen(id=one.lease_id, stage=one.stage, worker=one.worker, samples=one.samples, seconds=one.seconds)
                for one in queue.leases
            ],
            staleness=StalenessReply(
                in_flight=_named(staleness.in_flight),
                in_queue=_named(staleness.in_queue),
                at_training=_named(staleness.at_training),
            ),
            history=HistoryReply(
                step=list(queue.history.step), histogram=[_named(found) for found in queue.history.histogram]
            )
            if history
            else None,
            bytes=queue.bytes,
            capacity=queue.capacity,
            bottleneck=None if bottleneck is None else BottleneckReply(stage=bottleneck.stage, text=bottleneck.text),
        )


def _named(histogram: Mapping[int, int]) -> dict[str, int]:
    return {str(staleness): samples for staleness, samples in histogram.items()}


# -- workers and engines -----------------------------------------------------------------------------------------------


class Shares(Reply):
    """Of the last minute, 0 to 1."""

    busy: float
    idle: float
    blocked: float


class WorkerReply(Reply):
    name: str
    stage: str | None
    activity: Literal["busy", "idle", "blocked"]
    cause: str | None
    waits_for: str | None
    """The cause as it stands behind `waits for`."""
    since_seconds: float
    heartbeat_seconds: float | None
    """Since its last sign of life; None before it has begun."""
    drained: bool
    shares: Shares


class WorkersReply(Reply):
    object: Literal["list"] = "list"
    data: list[WorkerReply]
    """Empty for a run that does not go on."""


class EngineReply(Reply):
    name: str
    kind: str
    served: str | None
    digest: str | None
    attested: bool | None
    """Whether it served what it says when the learner last compared; None: it has not yet."""
    in_flight: int


class EnginesReply(Reply):
    object: Literal["list"] = "list"
    data: list[EngineReply]


class SpanReply(Reply):
    worker: str
    activity: Literal["busy", "idle", "blocked"]
    start: str
    end: str
    cause: str | None


class TimelineReply(Reply):
    object: Literal["timeline"] = "timeline"
    spans: list[SpanReply]


class ProgressReply(Reply):
    step: int
    steps: int
    seconds: float
    eta_seconds: float | None
    phase: str


class LiveReply(Reply):
    """One event of `live`."""

    queue: QueueReply
    workers: list[WorkerReply]
    progress: ProgressReply | None


class SeriesReply(Reply):
    step: list[int]
    time: list[str]
    value: list[float]


class MetricsReply(Reply):
    object: Literal["metrics"] = "metrics"
    names: list[str]
    """All that there are."""
    series: dict[str, SeriesReply]


# -- samples -----------------------------------------------------------------------------------------------------------


class SampleBrief(Reply):
    id: int
    group_id: int
    state: str
    step: int | None
    attempts: int
    staleness: int | None
    reward: float | None
    prompt: str | None
    response: str | None
    versions: list[str]
    reason: str | None

    @classmethod
    def of(cls, brief: Brief) -> SampleBrief:
        return cls.model_validate(brief, from_attributes=True)


class SamplesReply(Reply):
    object: Literal["list"] = "list"
    data: list[SampleBrief]
    has_more: bool
    next_cursor: str | None


class TokenReply(Reply):
    id: int
    text: str | None


class ResponseTokenReply(TokenReply):
    logprob: float | None
    ref_logprob: float | None
    version: str | None
    masked: bool


class MomentReply(Reply):
    lsn: int
    at: str
    type: str
    message: str


class SampleReply(SampleBrief):
    """With whole texts."""

    object: Literal["sample"] = "sample"
    columns: dict[str, Any]
    prompt_tokens: list[TokenReply]
    tokens: list[ResponseTokenReply]
    reward_parts: dict[str, float | None]
    finish_reason: str | None
    events: list[MomentReply]

    @classmethod
    def whole(cls, sample: Whole) -> SampleReply:
        return cls(
            **SampleBrief.of(sample.brief).model_dump(),
            columns=dict(sample.columns),
            prompt_tokens=[TokenReply(id=token.id, text=token.text) for token in sample.prompt_tokens],
            tokens=[ResponseTokenReply.model_validate(token, from_attributes=True) for token in sample.tokens],
            reward_parts=dict(sample.reward_parts),
            finish_reason=sample.finish_reason,
            events=[
                MomentReply(lsn=event.lsn, at=moment(event.at), type=event.kind, message=event.words)
                for event in sample.events
            ],
        )


# -- producers and consumers outside -----------------------------------------------------------------------------------

Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]
Id = Annotated[int, Field(ge=0, lt=1 << 63)]
Wait = Annotated[float, Field(ge=0, le=30, description="Seconds for which the request waits.")]
Ttl = Annotated[float, Field(ge=1, le=3600, description="Seconds until the samples go to somebody else.")]
Row = dict[str, Any]
MOST_ROWS = 4096


class PutName(Request):
    """Names one put: repeating it changes nothing."""

    producer: Name
    epoch: int = Field(default=0, ge=0, lt=1 << 31)
    sequence: int = Field(ge=0, lt=1 << 63)


class PromptsRequest(Request):
    """Prompts, each a row of the columns `prompt` (text or chat messages), `prompt_columns` (an object, for the reward
    functions) and `prompt_ids` (tokens; the run makes them where they are left out)."""

    prompts: list[Row] = Field(min_length=1, max_length=MOST_ROWS)
    put: PutName | None = None
    timeout_seconds: Wait = 5.0


class SamplesRequest(Request):
    """Finished samples: for each the columns of its prompt and of the stages that have seen it. Those of one group
    stand together."""

    samples: list[Row] = Field(min_length=1, max_length=MOST_ROWS)
    put: PutName | None = None
    timeout_seconds: Wait = 5.0


class AdmittedGroup(Reply):
    group_id: int
    sample_ids: list[int]


class PutReply(Reply):
    object: Literal["put"] = "put"
    groups: list[AdmittedGroup]


class LeaseRequest(Request):
    worker: Name
    max_samples: int = Field(default=64, ge=1, le=MOST_ROWS)
    min_samples: int = Field(default=1, ge=1, le=MOST_ROWS)
    timeout_seconds: Wait = 0.0
    ttl_seconds: Ttl = 60.0


class LeaseReply(Reply):
    object: Literal["lease"] = "lease"
    lease_id: int | None
    """None: nothing was ready."""
    deadline: str | None
    samples: list[Row]


class RenewRequest(Request):
    ttl_seconds: Ttl = 60.0


class AckRequest(Request):
    """For each sample its `sample_id` and the columns that the stage writes."""

    samples: list[Row] = Field(min_length=1, max_length=MOST_ROWS)


class NackRequest(Request):
    sample_ids: list[Id] = Field(min_length=1, max_length=MOST_ROWS)
    reason: str = Field(min_length=1, max_length=1000)
    final: bool = False
    """Puts them into quarantine."""


class LeaseUpdate(Reply):
    object: Literal["lease_update"] = "lease_update"
    lease_id: int
    samples: int
    """That it was about."""
    deadline: str | None = None


# -- completions -------------------------------------------------------------------------------------------------------

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 17)]
Text = Annotated[str, Field(min_length=1, max_length=1 << 20)]


class CompletionRequest(Request):
    """As OpenAI's `POST /v1/completions`; what is left out here is refused."""

    model: str = Field(min_length=1, max_length=200)
    """Id of a job: the policy that its run serves now."""
    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=16)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=16)]
    )
    max_tokens: int = Field(default=16, ge=1, le=1 << 17)
    n: int = Field(default=1, ge=1, le=16)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 31)
    logprobs: Literal[0, 1] | None = None
    """Any number gives those of the tokens that were sampled; those of others are not known."""
    echo: Literal[False] = False
    stream: Literal[False] = False
    user: str | None = Field(default=None, max_length=200)
    timeout_seconds: float = Field(default=60.0, gt=0, le=600)


class ChoiceLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float]
    text_offset: list[int]
    top_logprobs: None = None


class Choice(Reply):
    text: str
    index: int
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"]


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionReply(Reply):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str
    """Policy versions of the tokens."""
