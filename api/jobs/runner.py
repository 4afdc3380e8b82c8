"""The process of one job: `python -m asyncflow_api.jobs.runner JOB_DIR LOCK`, LOCK the descriptor of the job's lock.

It lives on when the service dies, and leaves behind what a service that starts again needs to know (`jobs.folder`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asyncflow_api.jobs.folder import Exit, JobFolder, summary_of

from asyncflow.errors import AsyncFlowError, UserError

logger = logging.getLogger(__name__)


def main(job_dir: str, lock: str) -> int:
    # Nobody else may keep the lock: a process that outlives this one is not the job.
    os.set_inheritable(int(lock), False)
    folder = JobFolder(Path(job_dir))
    folder.add_start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        how = carry_out(folder)
    except UserError as error:
        how = Exit(outcome="failed", code="invalid_config", message=str(error))
    except AsyncFlowError as error:
        how = Exit(outcome="failed", code="run_failed", message=str(error))
    except KeyboardInterrupt:
        how = _said(summary_of(folder)) or Exit(outcome="stopped", code="stopped", message="it was stopped at once")
    except Exception as error:
        logger.exception("the job failed")
        how = Exit(outcome="failed", code="internal_error", message=f"{type(error).__name__}: {error}")
    folder.end(how)
    return 0 if how.outcome == "finished" else 1


def carry_out(folder: JobFolder) -> Exit:
    """Make the run, to its end. Raises UserError for what cannot run at all."""
    from asyncflow.launch import launch, prepare_resume, resolve
    from asyncflow.plan import plan

    order = folder.order()
    if order.resume:
        ready, at = prepare_resume(folder.run, changes=order.config)
    else:
        ready, at = plan(resolve({**order.config, "run_dir": str(folder.run)})), None
    how = _said(asdict(launch(ready, going_on=at).summary))
    assert how is not None
    return how


def _said(summary: Mapping[str, Any] | None) -> Exit | None:
    """What a run's summary says; None where there is none."""
    match summary:
        case {"outcome": "finished", "steps": steps}:
            return Exit(outcome="finished", code="finished", message=f"it made all of its {steps} steps")
        case {"outcome": "stopped", "steps": steps}:
            return Exit(outcome="stopped", code="stopped", message=f"it was stopped after step {steps}")
        case {"outcome": "failed", "reason": reason}:
            return Exit(outcome="failed", code="run_failed", message=reason or "the run failed")
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
