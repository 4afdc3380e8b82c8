"""Where prompts come from, and how held-out problems are kept apart from trained ones.

Left out on purpose: data hubs and data sets on disk in other formats (convert them to JSONL or Parquet), mixing several
sources, and reading a file in pieces (all problems are held in memory).
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import difflib
import json
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from asyncflow.config import DataConfig
from asyncflow.errors import DataError
from asyncflow.types import Prompt

GENERATOR = "reasoning_gym:"
FILE_SUFFIXES = (".jsonl", ".parquet")
LIKELY_PROMPTS = ("question", "problem", "query", "instruction", "input", "messages", "text", "content")
"""What the column with the prompt is called in data made for something else, the likeliest first."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Problems:
    """The prompts of a run: no content is both trained and held out."""

    train: Sequence[Prompt]
    """Every item of the source whose content is not held out, in the source's order."""
    distinct: int
    """Different contents among `train`; the other items repeat one of them."""
    eval: Sequence[Prompt]
    """`data.eval_size` problems with different contents, none of which is trained."""

    @cached_property
    def digest(self) -> str:
        """xxh3-128 (hex) of the training prompts in their order, every column included."""
        digest = xxhash.xxh3_128()
        for prompt in self.train:
            digest.update(json.dumps([prompt.messages, dict(prompt.columns)], default=str, sort_keys=True).encode())
        return str(digest.hexdigest())


def load_problems(config: DataConfig, seed: int) -> Problems:
    """Read or generate the problems of a run, and hold some out by content.

    Two items are the same problem when their prompts are: Unicode form and white space do not count, other columns
    neither. `eval_size` items with different contents are drawn at random, and every item of the same content leaves
    the training set, under whichever index it stands (one-digit sums repeat after 200 items). What remains is trained
    as often as the source has it: `reasoning_gym:chain_sum` with up to two digits makes as many one-digit as two-digit
    sums, though there are 80 times fewer of them, and dropping the repeats would leave hardly anything that a small
    model can begin to learn from. Held-out problems are drawn from the items, so they have the same mix.

    `data.eval` names another source for the held-out problems; what is drawn there leaves the training set as well.
    What is held out, and what a generator makes, follow from `seed` alone. `data.options` and `data.size` go to every
    generator, `data.template` applies to every source.

    Raises DataError, one sentence that says what to do, for a source that is missing, empty or malformed, for settings
    that do not fit it, and when there are fewer than `eval_size` + 1 different problems.
    """
    sources = [config.train] if config.eval is None else [config.train, config.eval]
    if config.options and not any(source.startswith(GENERATOR) for source in sources):
        raise DataError(f"data.options are settings of a generator, and {config.train} is a file: remove them")
    items = _load(config.train, config, seed)
    held_out = _draw(items if config.eval is None else _load(config.eval, config, seed), config.eval_size, seed)
    if len(held_out) < config.eval_size:
        raise DataError(
            f"{sources[-1]} has {len(held_out)} different problems, too few to hold out {config.eval_size}: "
            f"lower data.eval_size or {_how_to_get_more(sources[-1])}"
        )
    contents = [_content(item) for item in items]
    train = tuple(item for item, content in zip(items, contents, strict=True) if content not in held_out)
    if not train:
        raise DataError(
            f"all {len(set(contents))} different problems of {config.train} are held out and none is left to train: "
            f"lower data.eval_size or {_how_to_get_more(config.train)}"
        )
    return Problems(train=train, distinct=len(set(contents) - held_out.keys()), eval=tuple(held_out.values()))


def _draw(items: Sequence[Prompt], count: int, seed: int) -> dict[str, Prompt]:
    """Up to `count` items, drawn at random, by their content, of which no two have the same."""
    drawn: dict[str, Prompt] = {}
    for index in np.random.default_rng(seed).permutation(len(items)):
        if len(drawn) == count:
            break
        drawn.setdefault(_content(items[index]), items[index])
    return drawn


def _how_to_get_more(source: str) -> str:
    return "raise data.size or widen data.options" if source.startswith(GENERATOR) else "add problems"


def _content(prompt: Prompt) -> str:
    """What makes a problem itself. Text and a single user message of the same words are the same problem."""
    if isinstance(prompt.messages, str):
        return json.dumps([["user", _normalised(prompt.messages)]])
    return json.dumps([[message["role"], _normalised(message["content"])] for message in prompt.messages])


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _load(source: str, config: DataConfig, seed: int) -> list[Prompt]:
    """All items of one source. `where` names an item in messages."""
    if source.startswith(GENERATOR):
        rows = _generate(source, config, seed)
        template = config.template if config.template is not None else "{question}"
        return [_from_template(template, row, where) for where, row in rows]
    rows = _read(source)
    if config.template is not None:
        prompts = [_from_template(config.template, row, where) for where, row in rows]
    else:
        prompts = [_from_prompt_column(row, where) for where, row in rows]
    if not prompts:
        raise DataError(f"{source} holds no problems: name a file that has some")
    return prompts


# Files


def _read(source: str) -> Iterator[tuple[str, Row]]:
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{source} is a folder{_data_files_in(path)}: name one .jsonl or .parquet file")
    if not path.exists():
        raise DataError(f"there is no file {source}{_near(path)}: name a .jsonl or .parquet file, or {GENERATOR}<task>")
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise DataError(f"{source} is neither .jsonl nor .parquet: convert it to one of them")
    return _read_jsonl(path) if suffix == ".jsonl" else _read_parquet(path)


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (and no folder {path.parent})"
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    near = difflib.get_close_matches(path.name, names, n=3)
    return f" (near it: {', '.join(near)})" if near else _data_files_in(path.parent)


def _data_files_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in FILE_SUFFIXES)
    return f" (in {folder.resolve().name or folder}: {', '.join(names[:5])})" if names else ""


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"line {number} of {path}"
                    yield where, _parse_line(line, where)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the file and its permissions") from None


def _parse_line(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8 text: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg} at column {error.colno}): correct it") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is {_kind(row)}: write one JSON object on each line, with a `prompt`")
    return row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    where = f"row {number} of {path}"
                    yield where, _json_values(row, where)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({_line(error)}): write it again") from None


def _json_values(row: Row, where: str) -> Row:
    """The row as JSON would give it back, which is what the store keeps and reward functions get."""

    def plain(value: object) -> object:
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        if isinstance(value, decimal.Decimal):
            return str(value)
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(type(value).__name__)

    values = {}
    for column, value in row.items():
        if value is None or isinstance(value, str | int | float):
            values[column] = value
            continue
        try:
            values[column] = json.loads(json.dumps(value, default=plain))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where} holds a value in the column {column!r} that JSON cannot express ({error}): remove the column "
                f"or store text or numbers"
            ) from None
    return values


# Generators


def _generate(source: str, config: DataConfig, seed: int) -> Iterator[tuple[str, Row]]:
    """Items of a reasoning-gym task: `question`, `answer`, and the entries of its metadata, one level deep.

    A metadata entry that has the name of one of the other two is left out.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError(
            f"{source} needs the package reasoning-gym: install it (pip install reasoning-gym), or name a file"
        ) from None
    task = source.removeprefix(GENERATOR)
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"name one of its {len(DATASETS)} tasks, such as chain_sum"
        raise DataError(f"reasoning_gym has no task {task!r}: {hint}")
    _check_options(task, config.options, DATASETS[task][1])
    try:
        for number, item in enumerate(
            reasoning_gym.create_dataset(task, size=config.size, seed=seed, **config.options), start=1
        ):
            row = {**item["metadata"], "question": item["question"], "answer": item["answer"]}
            where = f"item {number} of {source}"
            yield where, _json_values(row, where)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source} refuses its settings ({_line(error)}): correct data.options") from error


def _check_options(task: str, options: Mapping[str, Any], settings: Any) -> None:
    names = [field.name for field in dataclasses.fields(settings) if field.name not in ("seed", "size")]
    for option in options:
        if option in names:
            continue
        if option == "size":
            raise DataError("data.options.size: set data.size instead")
        if option == "seed":
            raise DataError("data.options.seed: remove it, the generator takes the run's seed")
        near = difflib.get_close_matches(option, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
        raise DataError(f"data.options.{option} is not an option of reasoning_gym:{task}: {hint}")


# Prompts


def _from_template(template: str, row: Row, where: str) -> Prompt:
    columns = dict(row)
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        for name in names:
            root = name.split(".")[0].split("[")[0]
            if root not in columns:
                raise DataError(
                    f"data.template names the column {{{name}}}, which {where} does not have: "
                    f"its columns are {_listed(columns)}"
                )
        content = template.format(**columns)
    except DataError:
        raise
    except (ValueError, LookupError, AttributeError) as error:
        raise DataError(
            f"data.template {template!r} is not valid ({_line(error)}): write columns as {{name}}, braces twice"
        ) from None
    columns.pop("prompt", None)
    return Prompt(messages=_checked_messages([{"role": "user", "content": content}], where), columns=columns)


def _from_prompt_column(row: Row, where: str) -> Prompt:
    columns = dict(row)
    if "prompt" not in columns:
        likely = next((name for name in LIKELY_PROMPTS if name in columns), None) or next(
            (name for name, value in columns.items() if isinstance(value, str)), None
        )
        advice = (
            f"rename {likely} to prompt, or set data.template to '{{{likely}}}'" if likely else "add a column prompt"
        )
        raise DataError(f"{where} has no column prompt, its columns are {_listed(columns)}: {advice}")
    prompt = columns.pop("prompt")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"the prompt in {where} is empty: fill it in or remove the item")
        return Prompt(messages=prompt, columns=columns)
    return Prompt(messages=_checked_messages(prompt, where), columns=columns)


def _checked_messages(messages: object, where: str) -> tuple[Mapping[str, str], ...]:
    """Chat messages with absent values (Parquet fills them in) left out."""
    wrong = f"the prompt in {where} must be text, or chat messages [{{role: …, content: …}}] with text in them"
    if not isinstance(messages, list):
        raise DataError(f"{wrong}; it is {_kind(messages)}")
    if not messages:
        raise DataError(f"the prompt in {where} has no messages: fill it in or remove the item")
    checked = []
    for message in messages:
        if not isinstance(message, dict):
            raise DataError(f"{wrong}; one message is {_kind(message)}")
        values = {key: value for key, value in message.items() if value is not None}
        if not {"role", "content"} <= values.keys():
            raise DataError(f"{wrong}; one message has {_listed(values)}")
        for key, value in values.items():
            if not isinstance(value, str):
                raise DataError(f"{wrong}; the {key} of one message is {_kind(value)}")
        checked.append(values)
    if not any(message["content"].strip() for message in checked):
        raise DataError(f"the prompt in {where} is empty: fill it in or remove the item")
    return tuple(checked)


def _kind(value: object) -> str:
    names = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "missing" if value is None else names[type(value)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
