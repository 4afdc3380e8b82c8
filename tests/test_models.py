"""Models by name, and what is known about them without loading weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncflow.engines.models import MODELS, ModelInfo, describe_model, load_tokenizer, resolve_model
from asyncflow.engines.registry import learner_class, rollout_class
from asyncflow.errors import ConfigError, ModelError


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve_model("tiny")


def test_the_same_name_gives_the_same_folder_every_time(tiny: Path) -> None:
    assert resolve_model("tiny") == tiny
    assert resolve_model(str(tiny)) == tiny


def test_tiny_is_described_without_loading_it(tiny: Path) -> None:
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64

    assert describe_model(tiny) == ModelInfo(
        architecture="LlamaForCausalLM",
        parameters=128 * 64 + 2 * layer + 64,
        layers=2,
        hidden=64,
        heads=2,
        kv_heads=2,
        head_size=32,
        vocab=128,
        context=2048,
        tied=True,
        eos_ids=(2,),
    )


def test_tiny_has_one_token_a_character_and_a_chat_template(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    text = "What is 12 + 30?\nπ ≥ 3"

    ids = tokenizer.encode(text)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], add_generation_prompt=True, return_dict=False
    )

    assert len(tokenizer) == 128
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(chat) == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chat, skip_special_tokens=True) == "user\n1+1\nassistant\n"
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_a_model_that_is_made_twice_is_the_same_to_the_byte(tmp_path: Path) -> None:
    first: dict[str, bytes] = {}
    second: dict[str, bytes] = {}
    for files in (first, second):
        folder = tmp_path / str(id(files))
        folder.mkdir()
        MODELS["tiny"](folder)
        files |= {path.name: path.read_bytes() for path in folder.iterdir()}

    assert first == second


def test_making_a_model_leaves_the_random_state_alone(tmp_path: Path) -> None:
    import torch

    before = torch.random.get_rng_state()

    MODELS["tiny"](tmp_path)

    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_cached_folder_is_complete_even_if_two_processes_make_it_at_once(tmp_path: Path) -> None:
    code = "from asyncflow.engines.models import resolve_model; print(resolve_model('tiny'))"
    environment = {**os.environ, "ASYNCFLOW_CACHE": str(tmp_path)}

    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    folders = {process.communicate()[0].decode().split()[-1] for process in processes}

    assert [process.returncode for process in processes] == [0, 0]
    assert len(folders) == 1
    assert Path(folders.pop()).parent == tmp_path / "models"
    assert len([path for path in (tmp_path / "models").iterdir() if path.is_dir()]) == 1


def test_a_hub_model_that_cannot_be_downloaded_is_refused_with_what_to_do() -> None:
    code = "from asyncflow.engines.models import resolve_model; resolve_model('nobody/no-such-model')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert "ModelError: nobody/no-such-model is neither a local folder nor in the Hub's cache" in done.stderr
    assert "use a local folder or one of smollm2-135m, tiny" in done.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("no such model", "use one of smollm2-135m, tiny, an existing folder"),
        ("./no/such/folder", "Hub id"),
    ],
)
def test_an_unknown_name_is_refused_with_what_there_is(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        resolve_model(name)


def test_a_folder_that_is_no_model_is_refused_with_what_it_lacks(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_model(str(tmp_path))

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="safetensors"):
        resolve_model(str(tmp_path))

    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="tokenizer"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="hidden_size"):
        describe_model(tmp_path)


def test_a_torn_weight_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:100])

    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        describe_model(tmp_path)


def test_the_parameters_of_a_split_model_are_added_up_and_a_tied_head_counts_once(tiny: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    save_file({"model.embed_tokens.weight": torch.zeros(128, 64)}, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": torch.zeros(128, 64), "norm": torch.zeros(64)}, tmp_path / "b.safetensors")
    save_file({"ignored": torch.zeros(1000)}, tmp_path / "consolidated.safetensors")
    weight_map = {
        "model.embed_tokens.weight": "a.safetensors",
        "lm_head.weight": "b.safetensors",
        "norm": "b.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert describe_model(tmp_path).parameters == 128 * 64 + 64


def test_the_registry_knows_its_names_and_takes_import_paths() -> None:
    from asyncflow.engines.fake import FakeLearner, FakeRollout

    assert rollout_class("fake") is FakeRollout
    assert learner_class("fake") is FakeLearner
    assert rollout_class("asyncflow.engines.fake:FakeRollout") is FakeRollout
    assert learner_class("torch").__name__ == "TorchLearner"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vlm", "did you mean vllm"),
        ("something", "use one of fake, vllm"),
        ("no_such_package.engine:Engine", "cannot be imported"),
        ("asyncflow.engines.fake:Nothing", "has no 'Nothing'"),
        ("asyncflow.engines.fake:FakeLearner", "must be a subclass of asyncflow.RolloutEngine"),
        ("asyncflow.engines.fake:load_table", "must be a subclass of asyncflow.RolloutEngine"),
    ],
)
def test_an_engine_that_is_none_is_refused_with_the_reason(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rollout_class(name)
