"""The word-level tokenizer of the bundled task, built with the `tokenizers` library.

Words include their leading space; numbers are single digits, the first of which includes the space.
Decoding concatenates tokens, so that a text survives the round trip.
"""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm.tasks import word_problems

EOS, MASK, UNK = "<|endoftext|>", "<|mdm_mask|>", "<|unk|>"
_WORDS = """has then Then he she He She buys finds gets more wins loses sells gives away uses How many does have
Start with Add Subtract First Next Finally So We compute and The answer is""".split()
_SYMBOLS = [".", ",", "?", ":", " +", " -", " ="]
# The last question, and an answer that is begun.
_LAST_TURN = (
    "{% if messages|length > 1 and messages[-1]['role'] == 'assistant' %}{{ messages[-2]['content'] }}{% endif %}"
    "{{ messages[-1]['content'] }}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: a little over 100 entries, end-of-text padding, a pass-through chat template."""
    words = dict.fromkeys([*word_problems.PEOPLE, *word_problems.OBJECTS, *_WORDS])
    entries = [EOS, MASK, UNK, *_SYMBOLS]
    entries += [space + digit for space in ("", " ") for digit in string.digits]
    entries += [space + word for word in words for space in ("", " ")]
    tokenizer = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=UNK))
    pattern = Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=_LAST_TURN,
        model_max_length=512,
    )
