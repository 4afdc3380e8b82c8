"""The documentation names what there is: files, sections of pages, commands and their options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from asyncflow.cli.main import app
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|[$&|(`]|\bthen |\buntil \w+=\$\()\s*(asyncflow (?!is |runs )[a-z][^`#\n;)]*)", re.MULTILINE)
PICTURED = re.compile(r"\.\.\.|…|<[^>]*>|\[|\]")


def broken_links(page: Path) -> Iterator[str]:
    for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, section = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        if not linked.exists():
            yield f"{target}: there is no such file"
        elif section and section not in sections(linked):
            yield f"{target}: the page has no such section"


def sections(page: Path) -> set[str]:
    """The names that a page's headings have as link targets."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def commands_of(group: Any) -> dict[str, Any]:
    """The commands of a group by name; none of what is no group."""
    return getattr(group, "commands", {})


def wrong_command(line: str) -> str | None:
    """What a command that a page shows has and the command line has not."""
    line = re.split(r" (?:\||&|>|&&) ?", line)[0].strip()
    words = shlex.split(PICTURED.sub(" ", line).replace("'", "").replace('"', ""))[1:]
    command: Any = typer.main.get_command(app)
    while (below := commands_of(command)) and words and not words[0].startswith("-"):
        names = words.pop(0).split("|")
        for name in names:
            if name not in below:
                return f"{line}: there is no command {name}"
        command = below[names[0]]
    if command.context_settings.get("ignore_unknown_options"):
        return None  # its options are another program's
    options = {option for one in command.params for option in one.opts} | {"--help"}
    unknown = [word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word) and word not in options]
    return f"{line}: there is no option {unknown[0]}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_exists_with_its_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    assert [wrong for line in COMMAND.findall(text) if (wrong := wrong_command(line)) is not None] == []


def test_every_option_of_the_service_is_in_its_table() -> None:
    group = typer.main.get_command(app)
    text = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| option \| meaning \|\n(.*?)\n\n", text, re.DOTALL)

    named = set(re.findall(r"`(--[a-z-]+)", table))

    assert named == {option for one in commands_of(group)["serve"].params for option in one.opts}


def test_every_command_about_a_service_is_in_the_table_of_its_page() -> None:
    group = typer.main.get_command(app)
    text = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    shown = " ".join(line for line in text.splitlines() if line.startswith("| `"))

    for name, command in commands_of(group).items():
        if getattr(command, "rich_help_panel", None) is None or "service" not in str(command.rich_help_panel):
            continue
        for inner in commands_of(command) or ("",):
            assert re.search(rf"`{name} {inner}".rstrip(), shown), f"{name} {inner} is not in docs/client.md"


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One and two\n[x](b.md) [y](a.md#one-and-two) [z](#none)\n```\n[no](c.md)\n```\n")

    assert [text.split(":")[0] for text in broken_links(tmp_path / "a.md")] == ["b.md", "#none"]
    assert wrong_command("asyncflow run configs/tiny.yaml --set steps=2") is None
    assert "no command ran" in str(wrong_command("asyncflow ran x"))
    assert "no option --sett" in str(wrong_command("asyncflow run x --sett steps=2"))
    assert "no command tap" in str(wrong_command("asyncflow store tap x"))
