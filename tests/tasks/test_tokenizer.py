"""The bundled task's tokenizer: every word known, every text restored."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dllm.models.tokenizers import load_tokenizer
from dllm.tasks.tokenizer import EOS, MASK, UNK, build_tokenizer
from dllm.tasks.word_problems import problems

TEXTS = [text for problem in problems(2000, seed=1_000_002) for text in (problem.question, problem.solution)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def reloaded(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def test_the_task_has_no_unknown_word(tokenizer: PreTrainedTokenizerFast) -> None:
    unknown = tokenizer.unk_token_id
    assert not any(unknown in ids for ids in tokenizer(TEXTS).input_ids)


def test_other_words_are_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("Tom has zebras").input_ids[-1] == tokenizer.convert_tokens_to_ids(UNK) == tokenizer.unk_token_id


def test_texts_survive_the_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.batch_decode(tokenizer(TEXTS).input_ids) == TEXTS


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("Sam has 45 pens.") == ["Sam", " has", " 4", "5", " pens", "."]


def test_special_tokens_are_whole_and_left_out_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(f"The answer is{MASK}.{EOS}").input_ids
    assert ids[-3:] == [tokenizer.mask_token_id, tokenizer.convert_tokens_to_ids("."), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The answer is."


def test_no_special_token_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("Tom").input_ids == [tokenizer.convert_tokens_to_ids("Tom")]
    assert tokenizer("").input_ids == []


def test_batches_are_padded_on_the_left_with_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tokenizer(["Tom", "Tom has"], padding=True)
    assert batch.input_ids[0][0] == tokenizer.eos_token_id
    assert batch.attention_mask == [[0, 1], [1, 1]]


def test_a_chat_is_its_last_message(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "Tom has 5 pens."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "Tom has 5 pens."


def test_a_saved_tokenizer_does_the_same(tokenizer: PreTrainedTokenizerFast, reloaded: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(TEXTS[:200]).input_ids
    assert reloaded(TEXTS[:200]).input_ids == ids
    assert reloaded.batch_decode(ids) == TEXTS[:200]
    assert reloaded.special_tokens_map == tokenizer.special_tokens_map
    assert reloaded.padding_side == "left"
    assert reloaded.chat_template == tokenizer.chat_template
