"""Prompts: where they come from, in which order they are drawn, and how they become tokens."""

from asyncflow.data.sources import Problems, load_problems
from asyncflow.data.stream import PromptStream
from asyncflow.data.tokens import Tokenizer, check_lengths, tokenise

__all__ = ["Problems", "PromptStream", "Tokenizer", "check_lengths", "load_problems", "tokenise"]
