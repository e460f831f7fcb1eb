"""A tokenizer that can write any text."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, one special token, and an added one that is not special."""
    alphabet = sorted(ByteLevel.alphabet())
    words = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=words)
    made.add_tokens([AddedToken("<|special|>", special=True), AddedToken("<|turn|>", special=False)])
    return made
