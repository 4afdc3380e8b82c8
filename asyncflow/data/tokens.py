"""From a prompt to token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from asyncflow.errors import DataError
from asyncflow.types import Int32s, Prompt

EXCERPT = 60
"""Characters of a prompt that an error message shows."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any

    def __call__(self, text: str) -> Mapping[str, Any]:
        """Encode text; `input_ids` holds the tokens."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render chat messages, and encode them."""


def tokenise(prompt: Prompt, tokenizer: Tokenizer) -> Int32s:
    """(P,) int32 tokens of a prompt: the chat template with the generation prompt for messages, plain text as it is.

    Plain text gets the special tokens that the tokenizer adds by itself (a begin token, where the model has one).
    Raises DataError when the tokenizer has no chat template for messages, when the template refuses them, or when
    nothing is left of the prompt.
    """
    if isinstance(prompt.messages, str):
        token_ids = tokenizer(prompt.messages)["input_ids"]
    else:
        token_ids = _tokenise_messages(prompt.messages, tokenizer)
    if not len(token_ids):
        raise DataError(f"the prompt {_excerpt(prompt)} has no tokens: remove it from the data")
    return np.asarray(token_ids, dtype=np.int32)


def check_lengths(prompts: Iterable[Prompt], tokenizer: Tokenizer, *, limit: int) -> None:
    """Raise DataError that names the first prompt of more than `limit` tokens, its length and the limit.

    `limit` is what the context leaves for a prompt: `max_model_len` less `max_new_tokens`, in tokens. A token stands
    for at least one byte of text, so a prompt that is short in bytes is not tokenised at all: checking a data set of
    ordinary prompts costs next to nothing. (Twice the bytes plus 256 leave room for the chat template, and for
    normalisers that lengthen the text.) Prompts are tokenised one by one, on purpose: the tokenizer's threads must not
    have run in a process that forks afterwards.
    """
    for number, prompt in enumerate(prompts, start=1):
        if 2 * _bytes(prompt) + 256 <= limit:
            continue
        length = len(tokenise(prompt, tokenizer))
        if length > limit:
            raise DataError(
                f"prompt {number}, {_excerpt(prompt)}, has {length} tokens, and at most {limit} leave room for the "
                f"response: shorten or remove it, lower max_new_tokens, or raise rollout.max_model_len"
            )


def _tokenise_messages(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> Sequence[int]:
    if not tokenizer.chat_template:
        raise DataError(
            "the prompts are chat messages and the model's tokenizer has no chat template: choose a model that is "
            "tuned for chat, or give `prompt` as plain text"
        )
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        raise DataError(
            f"the model's chat template refuses the messages {_excerpt(Prompt(messages=tuple(messages)))}: {error}"
        ) from error
    token_ids: Sequence[int] = encoded["input_ids"]
    return token_ids


def _bytes(prompt: Prompt) -> int:
    if isinstance(prompt.messages, str):
        return len(prompt.messages.encode())
    return sum(len(text.encode()) for message in prompt.messages for text in message.values())


def _excerpt(prompt: Prompt) -> str:
    text = prompt.messages if isinstance(prompt.messages, str) else prompt.messages[-1]["content"]
    return repr(text if len(text) <= EXCERPT else text[:EXCERPT] + "…")
