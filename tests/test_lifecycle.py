"""The state machine of a sample: all pairs, and drawn = coded."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from asyncflow.errors import IllegalTransition
from asyncflow.store.lifecycle import END_STATES, OPEN_STATES, STATES, TRANSITIONS, Move, State, next_states

PAGE = (Path(__file__).parents[1] / "docs" / "lifecycle.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("move", Move)
@pytest.mark.parametrize("state", State)
def test_a_move_leads_where_the_table_says_or_is_refused(state: State, move: Move) -> None:
    # beside others: of many samples, one that cannot move keeps all from it
    states = np.array([STATES.index(state)] * 3, np.uint8)
    if (state, move) in TRANSITIONS:
        assert [STATES[place] for place in next_states(states, move)] == [TRANSITIONS[state, move]] * 3
    else:
        legal = next(STATES.index(before) for before, other in TRANSITIONS if other is move)
        with pytest.raises(IllegalTransition, match=f"a sample that is {state} cannot {move}"):
            next_states(np.append(states[:1], np.uint8(legal)), move)


def test_every_state_is_open_or_an_end() -> None:
    assert {*OPEN_STATES, *END_STATES} == set(State)
    assert not set(OPEN_STATES) & set(END_STATES)


@pytest.mark.parametrize("state", END_STATES)
def test_nothing_leaves_an_end_state_but_by_going_back_or_from_quarantine(state: State) -> None:
    restored = {Move.RESTORE_PROMPT, Move.RESTORE_RESPONSE}
    allowed = restored if state is State.QUARANTINED else {Move.TAKE_BACK}
    assert {move for before, move in TRANSITIONS if before is state} <= allowed


def test_every_open_state_can_be_reached_and_can_reach_every_end() -> None:
    def reachable(start: State) -> set[State]:
        found, edge = {start}, [start]
        while edge:
            here = edge.pop()
            for (state, _), after in TRANSITIONS.items():
                if state is here and after not in found:
                    found.add(after)
                    edge.append(after)
        return found

    assert reachable(State.PROMPTED) == set(State)
    for state in OPEN_STATES:
        assert reachable(state) >= set(END_STATES)


def test_every_move_is_used() -> None:
    assert {move for _, move in TRANSITIONS} == set(Move)


def test_the_diagram_draws_exactly_the_coded_transitions() -> None:
    drawn = re.findall(r"^ +(\w+) --> (\w+) : (\w+)$", PAGE, flags=re.MULTILINE)

    assert sorted((state, move, after) for state, after, move in drawn) == coded()


def test_the_diagram_begins_and_ends_where_the_code_does() -> None:
    assert re.findall(r"^ +\[\*\] --> (\w+)", PAGE, flags=re.MULTILINE) == [State.PROMPTED]
    assert set(re.findall(r"^ +(\w+) --> \[\*\]", PAGE, flags=re.MULTILINE)) == set(END_STATES)


def test_the_documented_table_holds_exactly_the_coded_transitions() -> None:
    drawn = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|", PAGE, flags=re.MULTILINE)

    assert sorted(drawn) == coded()


def coded() -> list[tuple[str, str, str]]:
    return sorted((str(state), str(move), str(after)) for (state, move), after in TRANSITIONS.items())
