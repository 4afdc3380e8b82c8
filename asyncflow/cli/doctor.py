"""How an examination of the machine looks: lines as they come, with colour where there is a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from asyncflow.doctor import Finding

WIDTH = 22
"""Of the first column."""


def print_findings(findings: Iterable[Finding], console: Console | None = None) -> int:
    """Print findings while they are made; returns how many problems there are."""
    console = console or Console(highlight=False)
    problems = 0
    for finding in findings:
        problems += finding.problem is not None
        mark, style = ("ok", "green") if finding.problem is None else ("!!", "bold red")
        line = Text.assemble((mark, style), "  ", (f"{finding.area:<{WIDTH}}", "bold"), "  ", finding.text)
        console.print(line, soft_wrap=True)
        if finding.problem is not None:
            console.print(Text(f"    {'':<{WIDTH}}  {finding.problem}", style), soft_wrap=True)
    console.print("everything works" if not problems else f"{problems} problem{'s' if problems > 1 else ''}")
    return problems
