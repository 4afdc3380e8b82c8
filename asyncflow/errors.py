"""Everything that can go wrong, as a tree.

AsyncFlowError
├── UserError               what a user can fix; the message says what to do
│   ├── ConfigError         an unknown, contradictory or impossible setting
│   ├── DataError           a missing, empty or malformed data set
│   ├── ModelError          a model that is missing or cannot be loaded
│   ├── CheckpointError     a checkpoint that is missing, damaged, or does not fit the run
│   ├── ControlError        a run that cannot be reached, or a wish that it cannot fulfil
│   ├── ServiceError        what the HTTP service refuses
│   │   └── ServiceUnreachable  … or a service that does not answer
│   └── RewardError         a reward function that raises or returns something else than one number a completion
│       └── RewardTimeout   … that did not return in time
├── StoreError
│   ├── Closed              the store is closed and holds nothing more for this caller
│   ├── LeaseLost           the lease expired or was taken back: its rows belong to somebody else now
│   ├── IllegalTransition   a move that the life of a sample does not allow
│   ├── StalenessViolation  a commit with a row older than `max_staleness`
│   ├── LedgerError         a ledger that is missing, newer than this program, not consistent, or cannot be written
│   ├── UnknownFrame        a frame in a segment that the store does not know (any more): it is to be written again
│   ├── DamagedData         bytes of a sample that are not what was written
│   └── Unreachable         a store that does not answer
├── EngineError             an engine failed or does not do what it declared
│   ├── WeightsError        weights that are missing, torn, or not the ones that were asked for
│   └── PromptTooLong       a prompt that does not fit into the model's context
└── RunFailed               the run stopped because of a failure, which is its cause
"""

from __future__ import annotations

from collections.abc import Sequence


class AsyncFlowError(Exception):
    """Base of every error that this package raises on purpose."""


class UserError(AsyncFlowError, ValueError):
    """Something a user can fix; the message is one sentence that says what to do."""


class ConfigError(UserError):
    """An unknown, contradictory or impossible setting."""

    def __init__(self, message: str, *, fields: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)
        """(dotted key, what is wrong with it) for each setting, where several can be wrong at once."""


class DataError(UserError):
    """A missing, empty or malformed data set."""


class ModelError(UserError):
    """A model that is missing or cannot be loaded."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit the run."""


class ControlError(UserError):
    """A run that cannot be reached, or a wish that it cannot fulfil."""


class ServiceError(UserError):
    """What the HTTP service answers where it does not do what it was asked for."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int | None = None,
        field: str | None = None,
        errors: Sequence[tuple[str, str]] = (),
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        """For programs, such as `illegal_state`; docs/service.md has them."""
        self.status = status
        """Of HTTP; None where no answer came, or one that is not the service's."""
        self.field = field
        """What is wrong in the request: `body.config.steps`, `header.if-match`."""
        self.errors = tuple(errors)
        """(field, sentence) of each thing that is wrong, where there can be several."""
        self.request_id = request_id
        """By which the log of the service names the request."""


class ServiceUnreachable(ServiceError):
    """A service that does not answer, although it was asked again for as long as the caller's patience lasts."""


class RewardError(UserError):
    """A reward function that raises, or returns something else than one number a completion."""


class RewardTimeout(RewardError):
    """A call of a reward function that did not return in time."""


class StoreError(AsyncFlowError):
    """Base of what the store refuses."""


class Closed(StoreError):
    """The store is closed and holds nothing more for this caller."""


class LeaseLost(StoreError):
    """The lease expired or was taken back: its rows belong to somebody else now."""

    def __init__(self, message: str, *, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)
        """Those rows of the call that are not held any more; the others still are. Empty for a call without rows."""


class IllegalTransition(StoreError):
    """A move that the life of a sample does not allow."""


class StalenessViolation(StoreError):
    """A commit with a row older than `max_staleness`."""


class LedgerError(StoreError):
    """A ledger that is missing, newer than this program, not consistent, or cannot be written."""


class UnknownFrame(StoreError):
    """A frame in a segment that the store does not know (any more): it is to be written again."""


class DamagedData(StoreError):
    """Bytes of a frame that are not what was written, or not there any more."""

    def __init__(self, message: str, *, frame: int) -> None:
        super().__init__(message)
        self.frame = frame


class Unreachable(StoreError):
    """A store that does not answer."""


class EngineError(AsyncFlowError):
    """An engine failed, or does not do what it declared."""


class WeightsError(EngineError):
    """Weights that are missing, torn, or not the ones that were asked for."""


class PromptTooLong(EngineError):
    """A prompt that does not fit into the model's context."""


class RunFailed(AsyncFlowError):
    """The run stopped because of a failure, which is its `__cause__`."""
