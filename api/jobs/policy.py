"""What a configuration that came over the network may name: code, files and models only from the allow-lists.

Settings that the engines get as they are (`options`) may hold numbers and plain words; anything in them that could be
a path, an address or something to import is refused unless it is allowed.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from asyncflow_api.jobs.validator import FieldError
from asyncflow_api.settings import Settings

from asyncflow.config import Config
from asyncflow.engines.models import MODELS

GENERATOR: Final = "reasoning_gym:"
PLAIN_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _+-]{0,127}")
COLUMN: Final = re.compile(r"[A-Za-z_]\w{0,63}")
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
RUNS_CODE: Final = ("remote_code", "pickle", "plugin", "command", "shell", "_cls", "class", "module", "import")
"""Parts of names of options that make an engine run code that somebody names."""


def refusals(config: Config, settings: Settings) -> list[FieldError]:
    """Everything in a configuration that the allow-lists do not cover."""
    return [FieldError(field=key, message=text) for key, text in _refusals(config, settings)]


def _refusals(config: Config, settings: Settings) -> Iterator[tuple[str, str]]:
    if config.run_dir is not None:
        yield "run_dir", "run_dir is the service's to choose: leave it out"
    for number, reward in enumerate(config.reward):
        yield from _named_code(f"reward.{number}.use", reward.use, settings)
    yield from _named_code("rollout.engine", config.rollout.engine, settings)
    yield from _named_code("learner.engine", config.learner.engine, settings)
    if config.reference.engine is not None:
        yield from _named_code("reference.engine", config.reference.engine, settings)
    yield from _model("model", config.model, settings)
    if config.reference.model is not None:
        yield from _model("reference.model", config.reference.model, settings)
    for key, source in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if source is not None and not source.startswith(GENERATOR):
            yield from _path(key, source, settings, also=(settings.files_dir,))
    if config.data.template is not None:
        yield from _template(config.data.template)
    sections: dict[str, Mapping[str, Any]] = {
        "data.options": config.data.options,
        "rollout.options": config.rollout.options,
        "learner.options": config.learner.options,
        "reference.options": config.reference.options,
    }
    for key, options in sections.items():
        yield from _options(key, options, settings)


def _named_code(key: str, name: str, settings: Settings) -> Iterator[tuple[str, str]]:
    if ":" not in name and "." not in name and "/" not in name:
        return  # a short name: the plan knows whether there is such a one
    module = name.partition(":")[0]
    if not any(module == allowed or module.startswith(f"{allowed}.") for allowed in settings.allow_imports):
        yield (
            key,
            f"{key}: this service does not import {_short(name)}: use a short name, or have it started with "
            f"--allow-import {_short(module) or 'package.module'}",
        )


def _model(key: str, name: str, settings: Settings) -> Iterator[tuple[str, str]]:
    if name in MODELS:
        return
    if not HUB_ID.fullmatch(name) or ".." in name or Path(name).exists():
        yield from _path(key, name, settings)
    elif not any(fnmatchcase(name, pattern) for pattern in settings.allow_models):
        # It would come from the hub of the machine's choice, but fill its disk and be loaded by its libraries.
        yield (
            key,
            f"{key}: this service does not download {_short(name)}: use a short name ({', '.join(MODELS)}), or have it "
            f"started with --allow-model {_short(name)}",
        )


def _path(key: str, name: str, settings: Settings, also: Sequence[Path] = ()) -> Iterator[tuple[str, str]]:
    """A path is where it leads to once every link is followed. `also`: further folders in which it may be."""
    try:
        if "\0" in name or "://" in name:
            raise ValueError
        found = Path(name).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        yield key, f"{key}: {_short(name)} is no path that this service can follow: name a file in an allowed folder"
        return
    if not any(found.is_relative_to(folder.resolve()) for folder in (*settings.allow_paths, *also)):
        yield (
            key,
            f"{key}: {_short(name)} is not in a folder that this service may read: use a short name, or have it "
            "started with --allow-path FOLDER",
        )


def _template(template: str) -> Iterator[tuple[str, str]]:
    key = "data.template"
    try:
        fields = [(name, form) for _, name, form, _ in string.Formatter().parse(template) if name is not None]
    except ValueError:
        return  # the plan says what is wrong with it
    for name, form in fields:
        if not COLUMN.fullmatch(name) or form:
            yield key, f"{key}: {_short(name)} is no plain column: write columns as {{name}}, without format or index"


def _options(key: str, value: object, settings: Settings) -> Iterator[tuple[str, str]]:
    match value:
        case Mapping():
            for name, inner in value.items():
                if any(part in str(name).lower() for part in RUNS_CODE):
                    yield (
                        f"{key}.{name}",
                        f"{key}.{_short(str(name))} can make an engine run foreign code: leave it out",
                    )
                else:
                    yield from _options(f"{key}.{name}", inner, settings)
        case list() | tuple():
            for number, inner in enumerate(value):
                yield from _options(f"{key}.{number}", inner, settings)
        case str() if not PLAIN_WORD.fullmatch(value):
            yield from _path(key, value, settings)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…"
