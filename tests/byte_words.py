"""Tokenizers that can write any text, or any ASCII text."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, one special token, and an added one that is not special."""
    alphabet = sorted(ByteLevel.alphabet())
    words = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=words)
    made.add_tokens([AddedToken("<|special|>", special=True), AddedToken("<|turn|>", special=False)])
    return made


def prefixing_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token a letter; puts a space before each text, as `kind` does: "metaspace", "llama" or "byte_level"."""
    space = "Ġ" if kind == "byte_level" else "▁"
    letters = [space, *(each for each in string.printable[:95] if each != " ")]
    words = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    match kind:
        case "metaspace":
            words.pre_tokenizer, words.decoder = Metaspace(), decoders.Metaspace()
        case "llama":
            words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            words.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        case _:
            words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)
    made.add_special_tokens({"eos_token": "<|end|>", "mask_token": "<|mask|>"})
    return made
