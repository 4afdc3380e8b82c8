"""Prompts: sources, the split by content, the stream, and tokens."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncflow.config import DataConfig
from asyncflow.data import PromptStream, check_lengths, load_problems, tokenise
from asyncflow.errors import DataError
from asyncflow.types import Prompt

SUMS: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path: Path, **columns: list[Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def load(train: str, seed: int = 0, **settings: Any) -> Any:
    return load_problems(DataConfig(train=train, **settings), seed)


def refusal(train: str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(train, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Files


def test_a_jsonl_file_gives_text_prompts_with_their_columns(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", {"prompt": "one", "answer": 1}, {"prompt": "two", "answer": {"x": [2]}})

    problems = load(train)

    assert list(problems.train) == [
        Prompt(messages="one", columns={"answer": 1}),
        Prompt(messages="two", columns={"answer": {"x": [2]}}),
    ]
    assert not problems.eval


def test_a_jsonl_file_gives_chat_prompts(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]

    (prompt,) = load(jsonl(tmp_path / "a.jsonl", {"prompt": messages})).train

    assert prompt.messages == tuple(messages)


def test_blank_lines_and_a_byte_order_mark_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "two"}\r\n\n')

    assert [prompt.messages for prompt in load(str(path)).train] == ["one", "two"]


def test_a_parquet_file_gives_the_same_as_jsonl(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "one"}]
    rows = [{"prompt": messages, "answer": 1, "note": None}, {"prompt": messages * 2, "answer": 2, "note": "x"}]

    lines = load(jsonl(tmp_path / "a.jsonl", *rows))
    table = load(
        parquet(
            tmp_path / "a.parquet",
            prompt=[row["prompt"] for row in rows],
            answer=[row["answer"] for row in rows],
            note=[row["note"] for row in rows],
        )
    )

    assert table == lines


def test_absent_keys_of_parquet_messages_are_left_out(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "one", "name": None}, {"role": "user", "content": "two", "name": "Ann"}]]

    (prompt,) = load(parquet(tmp_path / "a.parquet", prompt=messages)).train

    assert prompt.messages == ({"role": "user", "content": "one"}, {"role": "user", "content": "two", "name": "Ann"})


def test_dates_of_a_parquet_file_become_text(tmp_path: Path) -> None:
    (prompt,) = load(parquet(tmp_path / "a.parquet", prompt=["one"], day=[datetime.date(2026, 1, 2)])).train

    assert prompt.columns == {"day": "2026-01-02"}


def test_a_template_makes_chat_prompts_and_needs_no_prompt_column(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", {"question": "1 + 1", "answer": "2"})

    (prompt,) = load(train, template="What is {question}? Answer in {{braces}}.").train

    assert prompt == Prompt(
        messages=({"role": "user", "content": "What is 1 + 1? Answer in {braces}."},),
        columns={"question": "1 + 1", "answer": "2"},
    )


def test_a_template_may_use_the_prompt_column(tmp_path: Path) -> None:
    (prompt,) = load(jsonl(tmp_path / "a.jsonl", {"prompt": "1 + 1"}), template="What is {prompt}?").train

    assert prompt == Prompt(messages=({"role": "user", "content": "What is 1 + 1?"},))


def test_a_missing_file_is_named_with_those_near_it(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", {"prompt": "x"})
    (tmp_path / "notes.txt").touch()

    assert "(near it: train.jsonl)" in refusal(str(tmp_path / "trian.jsonl"))
    assert "train.jsonl" in refusal(str(tmp_path / "zzz"))
    assert "notes.txt" not in refusal(str(tmp_path / "zzz"))
    assert "no folder" in refusal(str(tmp_path / "nowhere" / "train.jsonl"))
    assert "is a folder (in " in refusal(str(tmp_path))
    assert "reasoning_gym:<task>" in refusal("gsm8k")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt\nx\n")

    assert "neither .jsonl nor .parquet: convert it" in refusal(str(path))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "holds no problems" in refusal(jsonl(tmp_path / "a.jsonl"))
    assert "holds no problems" in refusal(parquet(tmp_path / "a.parquet", prompt=pa.array([], pa.string())))


def test_bad_json_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for second, complaint in (
        (b'{"prompt": "x",}', "line 2 of {} is not JSON (Illegal trailing comma"),
        (b"[1]", "line 2 of {} is a list: write one JSON object"),
        (b'{"prompt": "\xff"}', "line 2 of {} is not UTF-8"),
    ):
        path.write_bytes(b'{"prompt": "x"}\n' + second)
        found = refusal(str(path))
        # Interpreters word the reason differently.
        assert found.startswith(complaint.format(path).partition(" (")[0])


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 but not really")

    assert "cannot be read as Parquet" in refusal(str(path))


def test_bytes_in_a_parquet_column_are_refused_by_name(tmp_path: Path) -> None:
    found = refusal(parquet(tmp_path / "a.parquet", prompt=["x"], image=[b"\x00"]))

    assert "row 1 of" in found
    assert "the column 'image'" in found


def test_without_a_prompt_column_the_sentence_says_which_one_to_rename(tmp_path: Path) -> None:
    found = refusal(jsonl(tmp_path / "a.jsonl", {"answer": "2", "question": "1 + 1"}))

    assert "its columns are answer, question: rename question to prompt, or set data.template to '{question}'" in found


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (3, "it is a number"),
        (None, "it is missing"),
        ([], "has no messages"),
        ("  ", "is empty"),
        (["hello"], "one message is text"),
        ([{"role": "user"}], "one message has role"),
        ([{"role": "user", "content": [{"type": "image"}]}], "the content of one message is a list"),
        ([{"role": "user", "content": " "}], "is empty"),
    ],
)
def test_a_prompt_of_the_wrong_type_is_named_by_its_row(tmp_path: Path, prompt: object, complaint: str) -> None:
    found = refusal(jsonl(tmp_path / "a.jsonl", {"prompt": "fine"}, {"prompt": prompt}))

    assert "line 2 of" in found
    assert complaint in found


def test_a_template_that_names_no_column_lists_those_there_are(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", {"question": "1 + 1", "answer": "2"})

    assert "{expression}, which line 1" in refusal(train, template="{expression}")
    assert "its columns are answer, question" in refusal(train, template="{expression}")
    assert "its columns are" in refusal(train, template="What is {}?")
    assert "braces twice" in refusal(train, template="{question")


def test_options_for_a_file_are_refused(tmp_path: Path) -> None:
    assert "remove them" in refusal(jsonl(tmp_path / "a.jsonl", {"prompt": "x"}), options={"min_terms": 2})


# Generators


def test_a_generator_gives_the_question_and_the_columns_of_its_metadata() -> None:
    problems = load("reasoning_gym:chain_sum", options=SUMS, size=5)

    assert len(problems.train) == 5
    for prompt in problems.train:
        assert prompt.messages == ({"role": "user", "content": prompt.columns["question"]},)
        left, sign, right = prompt.columns["expression"].split()
        assert int(prompt.columns["answer"]) == int(left) + int(f"{sign}{right}")
        assert prompt.columns["source_dataset"] == "chain_sum"
        assert json.loads(json.dumps(prompt.columns)) == prompt.columns


def test_the_same_seed_generates_the_same_and_another_does_not() -> None:
    settings: dict[str, Any] = {"options": SUMS, "size": 50, "eval_size": 10, "template": "What is {expression}?"}

    assert load("reasoning_gym:chain_sum", 3, **settings) == load("reasoning_gym:chain_sum", 3, **settings)
    assert load("reasoning_gym:chain_sum", 3, **settings) != load("reasoning_gym:chain_sum", 4, **settings)


@pytest.mark.parametrize(
    ("task", "settings", "complaint"),
    [
        ("chain_summ", {}, "no task 'chain_summ': did you mean chain_sum?"),
        ("zzzzzz", {}, "name one of its "),
        (
            "chain_sum",
            {"options": {"max_term": 2}},
            "data.options.max_term is not an option of reasoning_gym:chain_sum",
        ),
        ("chain_sum", {"options": {"max_term": 2}}, "did you mean max_terms?"),
        ("chain_sum", {"options": {"zzz": 2}}, "it has min_terms, max_terms"),
        ("chain_sum", {"options": {"seed": 2}}, "the run's seed"),
        ("chain_sum", {"options": {"size": 2}}, "set data.size"),
        ("chain_sum", {"options": {"min_terms": 3, "max_terms": 2}}, "max_terms must be >= min_terms"),
        ("chain_sum", {"options": {"min_terms": "a"}}, "correct data.options"),
        ("chain_sum", {"template": "{nothing}"}, "{nothing}, which item 1 of reasoning_gym:chain_sum does not have"),
    ],
)
def test_wrong_settings_of_a_generator_are_refused(task: str, settings: dict[str, Any], complaint: str) -> None:
    assert complaint in refusal(f"reasoning_gym:{task}", **settings)


def test_a_missing_generator_package_is_named() -> None:
    program = (
        "import sys; sys.modules['reasoning_gym'] = None\n"
        "from asyncflow.config import DataConfig\nfrom asyncflow.data import load_problems\n"
        "try: load_problems(DataConfig(train='reasoning_gym:chain_sum'), 0)\nexcept ValueError as error: print(error)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "needs the package reasoning-gym: install it" in done.stdout


# The split


def test_no_content_is_both_trained_and_held_out() -> None:
    problems = load("reasoning_gym:chain_sum", options=SUMS, size=1000, eval_size=60, template="{expression}")

    trained = {prompt.messages[0]["content"] for prompt in problems.train}
    held_out = [prompt.messages[0]["content"] for prompt in problems.eval]
    assert len(held_out) == len(set(held_out)) == 60
    assert not trained & set(held_out)
    assert len(trained) == problems.distinct
    # The generator repeats itself, and what it repeats is trained as often.
    assert len(problems.train) > 2 * problems.distinct


def test_held_out_problems_have_the_mix_of_the_source() -> None:
    options = {**SUMS, "max_digits": 2}
    problems = load("reasoning_gym:chain_sum", options=options, size=4000, eval_size=100, template="{expression}")

    # Half of the items have one digit, though there are 80 times more different ones with two.
    digits = Counter(prompt.columns["num_digits"] for prompt in problems.eval)
    assert 30 <= digits[1] <= 60


def test_white_space_and_unicode_form_do_not_make_another_problem(tmp_path: Path) -> None:
    rows = [
        {"prompt": "café  au lait\n"},
        {"prompt": "cafe\u0301 au lait"},
        {"prompt": [{"role": "user", "content": " café au lait"}]},
    ]
    train = jsonl(tmp_path / "a.jsonl", *rows, {"prompt": "tea"})

    problems = load(train, eval_size=1)

    assert {len(problems.train), len(problems.eval)} <= {1, 3}
    assert problems.distinct == 1


def test_too_few_different_problems_are_refused_with_the_numbers(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", {"prompt": "one"}, {"prompt": "one "}, {"prompt": "two"})

    assert "has 2 different problems, too few to hold out 3: lower data.eval_size or add" in refusal(train, eval_size=3)
    assert "all 2 different problems" in refusal(train, eval_size=2)
    assert len(load(train, eval_size=1).eval) == 1
    assert "widen data.options" in refusal("reasoning_gym:chain_sum", options=SUMS, size=100, eval_size=100)


def test_problems_held_out_from_elsewhere_leave_the_training_set(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", *({"prompt": f"problem {n}"} for n in range(10)))
    test = jsonl(tmp_path / "test.jsonl", {"prompt": "problem 3"}, {"prompt": " problem 3"}, {"prompt": "another"})

    problems = load(train, eval=test, eval_size=2)

    assert sorted(str(prompt.messages).strip() for prompt in problems.eval) == ["another", "problem 3"]
    assert [prompt.messages for prompt in problems.train] == [f"problem {n}" for n in range(10) if n != 3]
    assert "test.jsonl has 2 different problems" in refusal(train, eval=test, eval_size=3)
    assert "none is left to train" in refusal(test, eval=test, eval_size=2)


# The stream

PROMPTS = [Prompt(messages=str(number)) for number in range(7)]


def draw(stream: PromptStream, count: int) -> list[str]:
    return [str(stream.next().messages) for _ in range(count)]


def test_every_epoch_has_every_prompt_once_in_another_order() -> None:
    stream = PromptStream(PROMPTS, seed=1)

    first, second = draw(stream, 7), draw(stream, 7)

    assert sorted(first) == sorted(second) == [str(number) for number in range(7)]
    assert first != second


def test_the_order_follows_from_the_seed() -> None:
    assert draw(PromptStream(PROMPTS, seed=1), 30) == draw(PromptStream(PROMPTS, seed=1), 30)
    assert draw(PromptStream(PROMPTS, seed=1), 30) != draw(PromptStream(PROMPTS, seed=2), 30)
    assert draw(PromptStream(PROMPTS, seed=1, shuffle=False), 8) == ["0", "1", "2", "3", "4", "5", "6", "0"]


@pytest.mark.parametrize("drawn", [0, 3, 6, 7, 20])
def test_a_stream_that_skips_what_another_has_drawn_goes_on_where_that_stopped(drawn: int) -> None:
    stream, restored = PromptStream(PROMPTS, seed=1), PromptStream(PROMPTS, seed=1)
    draw(stream, drawn)

    restored.skip(drawn)

    assert draw(restored, 20) == draw(stream, 20)


def test_a_stream_needs_prompts() -> None:
    with pytest.raises(DataError, match="no training prompts"):
        PromptStream([], seed=1)


# Tokens


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token for each byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        chat_template=(
            "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('unknown role') }}{% endif %}"
            "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        ),
    )


def chat(content: str, role: str = "user") -> Prompt:
    return Prompt(messages=({"role": role, "content": content},))


def test_messages_get_the_chat_template_with_the_generation_prompt(tokenizer: Any) -> None:
    tokens = tokenise(chat("hé"), tokenizer)

    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == "<user>hé<assistant>"


def test_text_is_encoded_as_it_is(tokenizer: Any) -> None:
    tokens = tokenise(Prompt(messages="<user> x"), tokenizer)

    assert tokens.dtype == np.int32
    assert tokens.shape == (8,)
    assert tokenizer.decode(tokens) == "<user> x"


def test_messages_without_a_chat_template_are_refused(tokenizer: Any) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)

    with pytest.raises(DataError, match="has no chat template: choose a model"):
        tokenise(chat("x"), plain)
    with pytest.raises(DataError, match="refuses the messages 'x': unknown role"):
        tokenise(chat("x", role="bad"), tokenizer)
    with pytest.raises(DataError, match="has no tokens"):
        tokenise(Prompt(messages=""), tokenizer)


def test_the_first_prompt_that_is_too_long_is_named_with_its_length(tokenizer: Any) -> None:
    prompts = [chat("short"), chat("x" * 83), chat("y" * 84), chat("z" * 900)]

    check_lengths(prompts[:2], tokenizer, limit=100)
    with pytest.raises(DataError, match=r"prompt 3, 'y+…', has 101 tokens, and at most 100 leave room"):
        check_lengths(prompts, tokenizer, limit=100)
    with pytest.raises(DataError, match=r"prompt 4, 'z+…', has 917 tokens, and at most 500"):
        check_lengths(prompts, tokenizer, limit=500)


def test_short_prompts_are_not_tokenised_to_find_out_that_they_fit() -> None:
    check_lengths([chat("x" * 1000), Prompt(messages="y" * 1000)], tokenizer=None, limit=4000)  # type: ignore[arg-type]
