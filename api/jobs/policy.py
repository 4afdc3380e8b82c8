"""What a configuration that came over the network may name: code, files and models only from the allow-lists.

Settings that the engines get as they are (`options`) may hold numbers and plain words; anything in them that could be
a path, an address or something to import is refused unless it is allowed.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
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


VLLM_OPTIONS: Final = frozenset(
    {
        "async_scheduling",
        "attention_backend",
        "block_size",
        "cpu_offload_gb",
        "cudagraph_capture_sizes",
        "data_parallel_size",
        "decode_context_parallel_size",
        "disable_cascade_attn",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "disable_sliding_window",
        "dtype",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enable_prefix_caching",
        "enable_sleep_mode",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_dtype",
        "kv_cache_memory_bytes",
        "logprobs_mode",
        "long_prefill_token_threshold",
        "max_cudagraph_capture_size",
        "max_logprobs",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "num_gpu_blocks_override",
        "optimization_level",
        "performance_mode",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "quantization",
        "scheduling_policy",
        "seed",
        "skip_tokenizer_init",
        "stream_interval",
        "tensor_parallel_size",
        "use_tqdm_on_load",
    }
)
"""vLLM's settings reach loaders, compilers, sockets and files. Of those that anybody may choose over the network, these
are known to say only how much and how fast."""

Found = Iterator[tuple[str, str]]


def refusals(config: Config, settings: Settings) -> list[FieldError]:
    """Everything in a configuration that the allow-lists do not cover."""
    found = [
        FieldError(field=key, message=text)
        for setting, rule in RULES.items()
        if rule is not None
        for place, value in _values(config, setting)
        for key, text in rule(place, value, settings)
    ]
    if config.rollout.engine == "vllm":
        found += [
            FieldError(field=f"rollout.options.{name}", message=text)
            for name, text in _vllm(config.rollout.options, settings)
        ]
    return found


def _values(config: Config, setting: str) -> Iterator[tuple[str, Any]]:
    """Where a setting is, and what it is there: in each item of a list. None is nothing that anybody names."""
    section, _, name = setting.rpartition(".")
    found = getattr(config, section) if section else config
    if isinstance(found, tuple):
        yield from ((f"{section}.{number}.{name}", getattr(one, name)) for number, one in enumerate(found))
    elif (value := getattr(found, name)) is not None:
        yield setting, value


def _run_dir(key: str, _path: Path, _settings: Settings) -> Found:
    yield key, "run_dir is the service's to choose: leave it out"


def _data(key: str, source: str, settings: Settings) -> Found:
    if not source.startswith(GENERATOR):
        yield from _path(key, source, settings, also=(settings.files_dir,))


def _vllm(options: Mapping[str, Any], settings: Settings) -> Found:
    for name in sorted(options.keys() - VLLM_OPTIONS - {*settings.allow_options}):
        if not _runs_code(name):
            yield (
                _short(name),
                f"rollout.options.{_short(name)} is not a setting of vLLM that anybody may choose here: leave it out, "
                f"or have this service started with --allow-option {_short(name)}",
            )


def _runs_code(name: str) -> bool:
    return any(part in name.lower() for part in RUNS_CODE)


def _named_code(key: str, name: str, settings: Settings) -> Found:
    if ":" not in name and "." not in name and "/" not in name:
        return  # a short name: the plan knows whether there is such a one
    module = name.partition(":")[0]
    if not any(module == allowed or module.startswith(f"{allowed}.") for allowed in settings.allow_imports):
        yield (
            key,
            f"{key}: this service does not import {_short(name)}: use a short name, or have it started with "
            f"--allow-import {_short(module) or 'package.module'}",
        )


def _model(key: str, name: str, settings: Settings) -> Found:
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


def _path(key: str, name: str, settings: Settings, also: Sequence[Path] = ()) -> Found:
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


def _template(key: str, template: str, _settings: Settings) -> Found:
    try:
        fields = [(name, form) for _, name, form, _ in string.Formatter().parse(template) if name is not None]
    except ValueError:
        return  # the plan says what is wrong with it
    for name, form in fields:
        if not COLUMN.fullmatch(name) or form:
            yield key, f"{key}: {_short(name)} is no plain column: write columns as {{name}}, without format or index"


def _options(key: str, value: object, settings: Settings) -> Found:
    match value:
        case Mapping():
            for name, inner in value.items():
                if _runs_code(str(name)):
                    yield (
                        f"{key}.{name}",
                        f"{key}.{_short(str(name))} can make an engine run foreign code: leave it out",
                    )
                else:
                    yield from _options(f"{key}.{name}", inner, settings)
        case list() | tuple():
            for number, inner in enumerate(value):
                yield from _options(f"{key}.{number}", inner, settings)
        case str() if ":" in value:  # as in `module:Class` and `host:port`, wherever such a file might be
            yield key, f"{key}: {_short(value)} could be an address or something to import: write a plain word"
        case str() if not PLAIN_WORD.fullmatch(value):
            yield from _path(key, value, settings)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…"


RULES: Final[Mapping[str, Callable[[str, Any, Settings], Found] | None]] = {
    "name": None,  # its pattern allows no separators
    "run_dir": _run_dir,
    "model": _model,
    "reward.use": _named_code,
    "reward.options": None,  # text that is compared and never evaluated; functions that somebody names get none
    "data.train": _data,
    "data.eval": _data,
    "data.template": _template,
    "data.options": _options,
    "rollout.engine": _named_code,
    "rollout.options": _options,
    "learner.engine": _named_code,
    "learner.options": _options,
    "reference.engine": _named_code,
    "reference.model": _model,
    "reference.options": _options,
}
"""Every setting that can hold any text → what it may name. A test finds those that are not here."""
