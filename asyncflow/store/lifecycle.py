"""The life of a sample as a table. `docs/lifecycle.md` draws it; `Table` is the only one that moves a sample."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from asyncflow.errors import IllegalTransition


class State(StrEnum):
    """Where a sample is. Who moves it on is said beside each."""

    PROMPTED = "prompted"  # rollout leases it
    GENERATING = "generating"  # rollout acks it, or its lease ends
    GENERATED = "generated"  # the scoring stages ack it
    REWARDED = "rewarded"  # all columns that training needs are there; actor update leases it
    TRAINING = "training"  # actor update commits it, or its lease ends
    TRAINED = "trained"  # end, once a checkpoint has passed it
    DROPPED = "dropped"  # end, with a reason; of a step's skipped samples once a checkpoint has passed them
    QUARANTINED = "quarantined"  # end, with its reasons; it may be put back as long as its group is open


class Move(StrEnum):
    """What can happen to a sample."""

    START_GENERATING = "start_generating"
    RETURN_PROMPT = "return_prompt"
    GENERATE = "generate"
    COMPLETE_SCORES = "complete_scores"
    START_TRAINING = "start_training"
    RETURN_SCORED = "return_scored"
    TRAIN = "train"
    DROP = "drop"
    QUARANTINE = "quarantine"
    TAKE_BACK = "take_back"
    GENERATE_AGAIN = "generate_again"
    RESTORE_PROMPT = "restore_prompt"
    RESTORE_RESPONSE = "restore_response"


OPEN_STATES = (State.PROMPTED, State.GENERATING, State.GENERATED, State.REWARDED, State.TRAINING)
END_STATES = (State.TRAINED, State.DROPPED, State.QUARANTINED)

TRANSITIONS: Mapping[tuple[State, Move], State] = {
    (State.PROMPTED, Move.START_GENERATING): State.GENERATING,
    (State.GENERATING, Move.RETURN_PROMPT): State.PROMPTED,
    (State.GENERATING, Move.GENERATE): State.GENERATED,
    (State.GENERATED, Move.COMPLETE_SCORES): State.REWARDED,
    (State.REWARDED, Move.START_TRAINING): State.TRAINING,
    (State.TRAINING, Move.RETURN_SCORED): State.REWARDED,
    (State.TRAINING, Move.TRAIN): State.TRAINED,
    # A run that resumes: what was consumed after its checkpoint, and responses of weights that are gone with it.
    # A response that is too old is generated again as well, where `late_samples` is `requeue`.
    (State.TRAINED, Move.TAKE_BACK): State.REWARDED,
    (State.DROPPED, Move.TAKE_BACK): State.REWARDED,
    (State.GENERATED, Move.GENERATE_AGAIN): State.PROMPTED,
    (State.REWARDED, Move.GENERATE_AGAIN): State.PROMPTED,
    # Somebody has mended what it failed of, and puts it back: without a response, or with one.
    (State.QUARANTINED, Move.RESTORE_PROMPT): State.PROMPTED,
    (State.QUARANTINED, Move.RESTORE_RESPONSE): State.GENERATED,
    **{(state, Move.DROP): State.DROPPED for state in OPEN_STATES},
    **{(state, Move.QUARANTINE): State.QUARANTINED for state in OPEN_STATES},
}
"""All legal moves; every other pair is refused."""

STATES = (*OPEN_STATES, *END_STATES)
"""All of them; the table keeps a sample's state as its place in here."""
_ILLEGAL = 255
_NEXT: Mapping[Move, NDArray[np.uint8]] = {
    move: np.array(
        [STATES.index(TRANSITIONS[state, move]) if (state, move) in TRANSITIONS else _ILLEGAL for state in STATES],
        np.uint8,
    )
    for move in Move
}


LATE = "late"
SHORT_GROUP = "short_group"
STRAGGLER = "straggler"
SKIPPED = "zero_variance_skipped"
RESERVED = (LATE, SHORT_GROUP, STRAGGLER, SKIPPED)
"""Reasons for which only the store itself drops samples."""
RAN_OUT = "the lease of {} ran out"
HAS_DIED = "{} has died"
"""Reasons for which only the store itself takes the rows of a worker's lease back."""


def next_states(states: NDArray[np.uint8], move: Move) -> NDArray[np.uint8]:
    """Where `move` leads samples in these states (places in `STATES`). Raises IllegalTransition where it is illegal."""
    after: NDArray[np.uint8] = _NEXT[move][states]
    if (illegal := after == _ILLEGAL).any():
        raise IllegalTransition(f"a sample that is {STATES[states[illegal][0]]} cannot {move}")
    return after
