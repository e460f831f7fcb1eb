"""A random model whose byte-level tokens can write any text, some of them several characters or parts of one."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import cache, lru_cache

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from dllm import LanguageModel
from dllm.structure.worker import attempt
from models import random_dream, random_llada

SUMS = """
start: expr
?expr: term | expr "+" term
?term: factor | term "*" factor
?factor: NUMBER | "(" expr ")"
%import common.INT -> NUMBER
%import common.WS
%ignore WS
"""
_WORDS = [
    "true",
    "false",
    "null",
    '"',
    '":',
    '": "',
    '", "',
    "}}",
    "]}",
    '"}',
    "ab",
    "abc",
    " a",
    "12",
    "0.",
    "é",
    "[1",
    "{}",
]
_ALPHABET = [chr(byte) for byte in range(32, 127)] + ["\n"]


@cache
def text_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte of ASCII text and of some other characters is a token, and so are some words."""
    shown = ByteLevel(add_prefix_space=False, use_regex=False)

    def written(text: str) -> str:
        return "".join(piece for piece, _ in shown.pre_tokenize_str(text))

    pieces = [written(each) for each in _ALPHABET + _WORDS] + list(written("éß€😀"))
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    words = Tokenizer(BPE(vocabulary, []))
    words.pre_tokenizer, words.decoder = shown, decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)
    made.add_tokens([AddedToken("<|other|>", special=True)])
    made.add_special_tokens({"eos_token": "<|end|>", "mask_token": "<|mask|>"})
    return made


@cache
def text_model(kind: str = "llada", seed: int = 0, sharpness: float = 5.0) -> LanguageModel:
    """A random model of these tokens."""
    words = text_tokenizer()
    made = {"llada": random_llada, "dream": random_dream}[kind]
    lm = made(len(words), seed, sharpness=sharpness)
    assert (lm.backbone.mask_token_id, lm.backbone.eos_token_ids[0]) == (words.mask_token_id, words.eos_token_id)
    return replace(lm, tokenizer=words)


@lru_cache(maxsize=16)
def compiled_here(form: str) -> bytes:
    """What the process would write that compiles a format, which takes longer to start than most formats to compile."""
    return pickle.dumps(attempt(form))
