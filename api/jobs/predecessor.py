"""A job that goes on with the run of another one gets a copy of it, so that the other stays as it ended."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from asyncflow_api.jobs.folder import JobFolder

from asyncflow.errors import UserError
from asyncflow.rundir import CHECKPOINTS, LEDGER, REPORT, SOCKET, SUMMARY

NOT_INHERITED: Final = (SOCKET, SUMMARY, REPORT)


def inherit(before: JobFolder, after: JobFolder) -> None:
    """Copy the run directory; files of checkpoints, which nobody writes again, are shared. Raises UserError, OSError.

    May be repeated until the new job has begun.
    """
    if not (before.run / LEDGER).is_file():
        raise UserError(f"{before.path.name} left no run to go on with: submit its configuration again")
    shutil.rmtree(after.run, ignore_errors=True)
    checkpoints = before.run / CHECKPOINTS

    def copy(source: str, target: str) -> str:
        if Path(source).is_relative_to(checkpoints):
            os.link(source, target)
            return target
        return shutil.copy2(source, target)

    shutil.copytree(before.run, after.run, ignore=shutil.ignore_patterns(*NOT_INHERITED), copy_function=copy)
