"""Alarms: what a person should know now rather than find out later."""

from __future__ import annotations

from typing import Any, Literal

from asyncflow.engines.weights.attestation import Fault
from asyncflow.types import Recorder

AlarmName = (
    Fault
    | Literal[
        "unattested",  # for some versions nothing showed which weights the engine serves
        "rollout_slow",  # a completion takes much longer than the others
        "rollout_timeout",  # … took too long and was given back
        "reward_hung",  # a reward function did not return
        "stalled",  # nothing happens
        "checkpoint_failed",  # the run goes on without it
        "samples_not_saved",  # they were trained, and are not in `samples/`
    ]
)
Severity = Literal["warning", "error"]


class Alarms:
    """The one way to raise an alarm: a line of kind `alarm` in the metrics, which terminal and report show."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def sound(self, alarm: AlarmName, text: str, *, severity: Severity = "warning", **details: Any) -> None:
        """Say one sentence. `details` (JSON) name what it is about: samples, versions, seconds."""
        self._recorder.log("alarm", {"alarm": alarm, "severity": severity, "text": text, **details})
