"""Tokenizers in the layouts LLaDA and Dream publish, written small and read back."""

from __future__ import annotations

import base64
import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from dllm.checks import Notice
from dllm.models.growth import check_prompts, check_texts
from dllm.models.tokenizers import load_tokenizer, text_of
from dllm.tasks.tokenizer import build_tokenizer

LLADA_TOKENS = (
    "<|startoftext|> <|endoftext|> [gMASK] <|mdm_mask|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
)
DREAM_TOKENS = "<|endoftext|> <|im_start|> <|im_end|> <|beginoftext|> <|mask|>".split()
LLADA_CHAT = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
DREAM_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "Hello world, don't stop!",
    " leading, trailing and  double  spaces \n\n\ttabs ",
    "spaces before , punctuation . n't 's stay",
    "naïve Ωmega 日本語 العربية 🙂👩‍👩‍👧 \u200b",
    "2024-11-20: 3.14159 + 1e-9",
    "",
]


def train() -> Tokenizer:
    """A byte-level BPE that has learnt whole numbers, which Qwen2's pre-tokenization never shows it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["hello world hello 2024 2024", "don't stop the music", "naïve café naïve café"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def added_tokens(tokens: list[str], first: int) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(first + i): {"content": token, **flags} for i, token in enumerate(tokens)}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_llada(folder: Path) -> None:
    """LLaDA's layout: everything in tokenizer.json, described again in tokenizer_config.json."""
    tokenizer = train()
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLADA_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "added_tokens_decoder": added_tokens(LLADA_TOKENS, first),
            "chat_template": LLADA_CHAT,
            "clean_up_tokenization_spaces": False,
            "fast_tokenizer": True,
            "gmask_token": "[gMASK]",
            "merges_file": None,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 1000000000000000019884624838656,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "trust_remote_code": True,
            "vocab_file": None,
        },
    )


def write_dream(folder: Path) -> None:
    """Dream's layout: vocab.json, merges.txt and added tokens, with a tokenizer class given as code."""
    tokenizer = train()
    first = tokenizer.get_vocab_size()
    tokenizer.model.save(str(folder))
    write_json(folder / "added_tokens.json", {token: first + i for i, token in enumerate(DREAM_TOKENS)})
    special = {
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added_tokens(DREAM_TOKENS, first),
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "chat_template": DREAM_CHAT,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 131072,
            "split_special_tokens": False,
            "tokenizer_class": "DreamTokenizer",
            "unk_token": None,
        },
    )
    trace = folder / "executed"
    (folder / "tokenization_dream.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nclass DreamTokenizer: ...\n", encoding="utf-8"
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each layout, to be read only."""
    folders = {}
    for layout, write in (("llada", write_llada), ("dream", write_dream)):
        folders[layout] = tmp_path_factory.mktemp(layout)
        write(folders[layout])
    return folders


def read(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module", params=["llada", "dream"])
def tokenizer(request: pytest.FixtureRequest, written: dict[str, Path]) -> PreTrainedTokenizerBase:
    return read(written[request.param])


@pytest.fixture
def dream(written: dict[str, Path], tmp_path: Path) -> Path:
    """A private copy of the Dream layout."""
    return Path(shutil.copytree(written["dream"], tmp_path / "dream"))


@pytest.fixture
def llada(written: dict[str, Path], tmp_path: Path) -> Path:
    """A private copy of the LLaDA layout."""
    return Path(shutil.copytree(written["llada"], tmp_path / "llada"))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@settings(max_examples=50)
@given(text=st.text(max_size=40))
def test_any_text_survives_the_round_trip_up_to_unicode_composition(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    decoded = tokenizer.decode(tokenizer(text).input_ids)
    assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(("layout", "tokens"), [("llada", LLADA_TOKENS), ("dream", DREAM_TOKENS)])
def test_special_tokens_are_single_ids_after_the_vocabulary(
    written: dict[str, Path], layout: str, tokens: list[str]
) -> None:
    tokenizer = read(written[layout])
    first = train().get_vocab_size()
    for i, token in enumerate(tokens):
        ids = tokenizer(f"a{token}b").input_ids
        assert ids[1:-1] == [first + i]
        assert tokenizer.decode(ids) == f"a{token}b"
        assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert len(tokenizer) == first + len(tokens)


def test_dream_splits_text_as_qwen2_does(written: dict[str, Path]) -> None:
    """Single digits, composed characters, a space before the word: not what the vocabulary was trained on."""
    dream, llada = read(written["dream"]), read(written["llada"])
    assert len(llada.tokenize("2024")) < 4
    assert dream.tokenize("2024") == ["2", "0", "2", "4"]
    assert dream("cafe\u0301").input_ids == dream("caf\u00e9").input_ids
    assert dream.tokenize("hello world") == ["hello", "Ġworld"]


@pytest.mark.parametrize(
    "named", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "TokenizersBackend", None]
)
def test_vocabulary_and_merges_are_read_as_their_class_splits(dream: Path, named: str | None) -> None:
    config = json.loads((dream / "tokenizer_config.json").read_text())
    write_json(dream / "tokenizer_config.json", config | {"tokenizer_class": named})
    gpt2 = str(named).startswith("GPT2")
    assert read(dream).tokenize("2024") == (train().encode("2024").tokens if gpt2 else [*"2024"])
    assert (read(dream).decode(read(dream)("cafe\u0301").input_ids) == "cafe\u0301") == gpt2


def test_a_class_that_splits_otherwise_is_refused(dream: Path) -> None:
    write_json(dream / "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"})
    assert "tokenizer_class='RobertaTokenizer' is not read from vocab.json and merges.txt" in _error_of(dream)


def test_letters_need_no_merges(tmp_path: Path) -> None:
    words = [*"acgt", "[UNK]", "<s>", "</s>", "[MASK]"]
    own = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="[UNK]"))
    own.add_special_tokens(["</s>", "[MASK]"])
    own.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"mask_token": "[MASK]", "eos_token": "</s>"})
    assert read(tmp_path)("gattaca").input_ids == [2, 0, 3, 3, 0, 1, 0]


def test_an_added_token_after_a_gap_is_told(llada: Path) -> None:
    content = json.loads((llada / "tokenizer.json").read_text())
    last = max(content["added_tokens"], key=lambda each: each["id"])
    last["id"] += 50
    write_json(llada / "tokenizer.json", content)
    with pytest.warns(Notice, match=f"'{re.escape(last['content'])}' the id {last['id'] - 50}, its files say"):
        assert read(llada).convert_tokens_to_ids(last["content"]) == last["id"] - 50


@pytest.mark.parametrize("template", [" \n", "{# none #}", [{"name": "default", "template": ""}]])
def test_a_chat_template_that_writes_nothing_is_none(dream: Path, template: Any) -> None:
    config = json.loads((dream / "tokenizer_config.json").read_text())
    write_json(dream / "tokenizer_config.json", config | {"chat_template": template})
    assert read(dream).chat_template is None


def test_dropout_of_training_is_off(llada: Path) -> None:
    content = json.loads((llada / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    write_json(llada / "tokenizer.json", content)
    tokenizer = read(llada)
    assert {tuple(tokenizer("hello 2024").input_ids) for _ in range(10)} == {tuple(train().encode("hello 2024").ids)}


def test_dream_code_is_never_executed(written: dict[str, Path]) -> None:
    read(written["dream"])
    assert (written["dream"] / "tokenization_dream.py").is_file()
    assert not (written["dream"] / "executed").exists()


def test_chat_template_of_llada_opens_the_answer(written: dict[str, Path]) -> None:
    tokenizer = read(written["llada"])
    chat = [{"role": "user", "content": " Hi "}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer(text).input_ids.count(tokenizer.convert_tokens_to_ids("<|start_header_id|>")) == 2


@pytest.mark.parametrize("in_a_file", [False, True])
def test_chat_template_of_dream_is_read_from_the_config_or_a_file(dream: Path, in_a_file: bool) -> None:
    if in_a_file:
        config = json.loads((dream / "tokenizer_config.json").read_text())
        (dream / "chat_template.jinja").write_text(config.pop("chat_template"), encoding="utf-8")
        write_json(dream / "tokenizer_config.json", config)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = read(dream).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("in_a_file", [False, True])
def test_an_empty_chat_template_is_none(dream: Path, in_a_file: bool) -> None:
    config = json.loads((dream / "tokenizer_config.json").read_text())
    write_json(dream / "tokenizer_config.json", config | {"chat_template": ""})
    if in_a_file:
        (dream / "chat_template.jinja").touch()
    assert read(dream).chat_template is None


@pytest.mark.parametrize("source", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_may_be_stated_in_either_file(dream: Path, source: str) -> None:
    expected = read(dream)("a<|im_end|>b<|mask|>").input_ids
    if source == "added_tokens.json":
        config = json.loads((dream / "tokenizer_config.json").read_text())
        del config["added_tokens_decoder"]
        write_json(dream / "tokenizer_config.json", config)
    else:
        (dream / "added_tokens.json").unlink()
    assert read(dream)("a<|im_end|>b<|mask|>").input_ids == expected


def test_batches_are_padded_on_the_left(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(["a", "a b c"], padding=True)
    short, long = batch.input_ids
    assert len(short) == len(long)
    assert short[:-1] == [tokenizer.pad_token_id] * (len(long) - 1)
    assert batch.attention_mask[0] == [0] * (len(long) - 1) + [1]


def test_the_bundled_tokenizer_is_read_back_as_it_was_built(tmp_path: Path) -> None:
    built = build_tokenizer()
    built.save_pretrained(tmp_path)
    loaded = read(tmp_path)
    text = "Sam has 38 pens. The answer is 52.<|mdm_mask|>"
    assert loaded(text).input_ids == built(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.mask_token_id == built.mask_token_id
    assert loaded.get_vocab() == built.get_vocab()


def test_a_folder_without_tokenizer_files_has_no_tokenizer(golden: Path) -> None:
    assert load_tokenizer(golden / "llada-rand-a") is None


def _write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def _shift_ids(folder: Path) -> None:
    ids = json.loads((folder / "added_tokens.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    write_json(folder / "added_tokens.json", {token: number + 5 for token, number in ids.items()})
    write_json(folder / "tokenizer_config.json", config)


def _cut_merges(folder: Path) -> None:
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:5]))


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        write_json(folder / "tokenizer.json", content)

    return edit


DREAM_DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no vocabulary": (lambda folder: (folder / "vocab.json").unlink(), ("vocab.json is missing",)),
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), ("merges.txt is missing",)),
    "vocabulary is not JSON": (_write("vocab.json", "{"), ("vocab.json", "cannot be read")),
    "vocabulary of another model": (_write("vocab.json", '{"a": 0}'), ("vocab.json", "cannot be read")),
    "merges are empty": (_write("merges.txt", ""), ("merges.txt", "its merges make only 0 of the ")),
    "merges are cut off": (_cut_merges, ("merges.txt", "its merges make only 4 of the ")),
    "merges are no merges": (_write("merges.txt", "a b c d\n"), ("merges.txt", "cannot be read")),
    "config is not JSON": (_write("tokenizer_config.json", "{"), ("tokenizer_config.json", "cannot be read")),
    "config is no object": (_write("tokenizer_config.json", "[1]"), ("tokenizer_config.json", "cannot be read")),
    "a length that is not a number": (
        _write("tokenizer_config.json", '{"model_max_length": {}}'),
        ("tokenizer_config.json", "model_max_length={} is not a number"),
    ),
    "ids with a gap": (_shift_ids, ("<|endoftext|>", "its files say")),
}
LLADA_DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), ("tokenizer.json is missing",)),
    "tokenizer.json is not JSON": (_write("tokenizer.json", "{"), ("tokenizer.json", "cannot be read")),
    "an added token with the id of a word": (
        _edit(lambda content: content["added_tokens"][-1].update(id=99)),
        ("'<|eot_id|>'", "its files say 99"),
    ),
    "words with one id": (
        _edit(lambda content: content["model"]["vocab"].update(a=content["model"]["vocab"]["b"])),
        ("its tokens 'a' and 'b' have one id",),
    ),
    "merges are cut off": (
        _edit(lambda content: content["model"]["merges"].__delitem__(slice(5, None))),
        ("its merges make only 5 of the ",),
    ),
    "tokenizer.json is empty": (_write("tokenizer.json", "{}"), ("tokenizer.json", "cannot be read")),
}


def _error_of(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # both callers look at the message
        load_tokenizer(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", DREAM_DAMAGE)
def test_damaged_dream_files_are_one_clear_line(dream: Path, damage: str) -> None:
    edit, expected = DREAM_DAMAGE[damage]
    edit(dream)
    message = _error_of(dream)
    for part in expected:
        assert part in message


@pytest.mark.parametrize("damage", LLADA_DAMAGE)
def test_damaged_llada_files_are_one_clear_line(llada: Path, damage: str) -> None:
    edit, expected = LLADA_DAMAGE[damage]
    edit(llada)
    message = _error_of(llada)
    for part in expected:
        assert part in message


def _replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _table(*texts: str) -> dict[str, Any]:
    """A Precompiled step of an empty trie that has some texts."""
    table = (1024).to_bytes(4, "little") + bytes(1024) + b"".join(text.encode() + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def _metaspace(letter: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": letter, "prepend_scheme": "always", "split": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _template(*pieces: str, ids: int = 1) -> dict[str, Any]:
    """A TemplateProcessing: A is the text, other names are special tokens of some ids each."""
    made = [{"Sequence" if each == "A" else "SpecialToken": {"id": each, "type_id": 0}} for each in pieces]
    special = {each: {"id": each, "ids": [3] * ids, "tokens": ["x"] * ids} for each in pieces if each != "A"}
    both = [*made, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": made, "pair": both, "special_tokens": special}


def _content(**parts: list[dict[str, Any]]) -> dict[str, Any]:
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    return {
        name: {"type": "Sequence", inner.get(name, "processors"): steps} if steps else None
        for name, steps in parts.items()
    }


BERT = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
FALLBACK = [{"type": "ByteFallback"}, {"type": "Fuse"}]
SPACES = _replace(" {2,}", "\u2581", "Regex")
PUBLISHED = {
    "LLaMA 2": _content(
        normalizer=[{"type": "Prepend", "prepend": "\u2581"}, _replace(" ", "\u2581")],
        decoder=[_replace("\u2581", " "), *FALLBACK, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
        post_processor=[_template("<s>", "A")],
    ),
    "LLaMA 3": _content(
        pre_tokenizer=[_split("(?i:'s|'t)|\\p{L}+|\\p{N}{1,3}"), BYTES],
        decoder=[BYTES],
        post_processor=[BYTES, _template("<|begin_of_text|>", "A")],
    ),
    "DeepSeek": _content(
        normalizer=[],
        pre_tokenizer=[
            *map(_split, ("\\p{N}{1,3}", "[\u4e00-\u9fa5]+", "[!-/]|\\s+")),
            {"type": "Digits", "individual_digits": True},
            BYTES,
        ],
        decoder=[BYTES],
    ),
    "Qwen": _content(normalizer=[{"type": "NFC"}], pre_tokenizer=[_split("\\p{L}+"), BYTES], decoder=[BYTES]),
    "Gemma": _content(
        normalizer=[_replace(" ", "\u2581")],
        pre_tokenizer=[
            {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        ],
        decoder=[_replace("\u2581", " "), *FALLBACK],
    ),
    "XLNet, ALBERT": _content(
        normalizer=[
            *(_replace(mark, '"') for mark in ("``", "''")),
            {"type": "NFKD"},
            {"type": "StripAccents"},
            {"type": "Lowercase"},
            _table("\u0635\u0644\u0649 \u0627\u0644\u0644\u0647", "1/2"),
            SPACES,
        ],
        pre_tokenizer=[{"type": "WhitespaceSplit"}, _metaspace("\u2581")],
        decoder=[_metaspace("\u2581")],
        post_processor=[_template("[CLS]", "A", "[SEP]")],
    ),
    "BERT": _content(
        normalizer=[{"type": "BertNormalizer", **BERT}],
        pre_tokenizer=[{"type": "BertPreTokenizer"}],
        decoder=[{"type": "WordPiece", "prefix": "##", "cleanup": True}],
        post_processor=[{"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]}],
    ),
    "CLIP": _content(
        normalizer=[{"type": "NFC"}, _replace("\\s+", " ", "Regex"), {"type": "Lowercase"}],
        pre_tokenizer=[_split("'s|'t|[\\p{L}]+|[\\p{N}]"), BYTES],
        decoder=[{"type": "BPEDecoder", "suffix": "</w>"}],
        post_processor=[
            {
                "type": "RobertaProcessing",
                "sep": ["<|endoftext|>", 2],
                "cls": ["<|startoftext|>", 1],
                "trim_offsets": False,
                "add_prefix_space": False,
            }
        ],
    ),
    "many replacements": _content(
        normalizer=[
            {"type": "NFKC"},
            *(_replace(each, each * 3) for each in "abcdefgh"),
            *(_replace(each, f" {each} ") for each in ",.;:!?"),
            *(
                _replace(each, " ", "Regex")
                for each in ("\\s+", "[\\r\\n]+", "\\s*\\n\\s*", "\\p{Zs}", "[^\\x00-\\x7f]+") * 4
            ),
            *(_replace(each, "-", "Regex") for each in ("^", "(?<=\\d)(?=\\d)")),
            SPACES,
        ]
    ),
}
SPECIAL = ["s"] * 200
GROWING = {
    "a long text before each": _content(normalizer=[{"type": "Prepend", "prepend": "a" * 10_000}]),
    "a text of a table": _content(normalizer=[_table("a " * 5001)]),
    "letters of letters, without their type": {
        "normalizer": {"normalizers": [{"pattern": {"String": "a"}, "content": "aa"}] * 40}
    },
    "letters of letters beside expressions": _content(
        normalizer=[_replace("a", "aa"), _replace("z", "y", "Regex")] * 40
    ),
    "letters of letters in another case": _content(
        normalizer=[_replace("a", "BB"), {"type": "Lowercase"}, _replace("b", "AA"), {"type": "Lowercase"}] * 20
    ),
    "letters between letters": _content(normalizer=[_replace("x*", "y", "Regex")] * 40),
    "letters between letters, of nothing": _content(normalizer=[_replace("", "y")] * 40),
    "letters of compatible ones": _content(normalizer=[_replace("\u0644", "\ufdfa"), {"type": "NFKD"}] * 20),
    "spaces around letters": _content(normalizer=[{"type": "BertNormalizer", **BERT}] * 40),
    "a letter before each piece": _content(
        pre_tokenizer=[step for each in map(chr, range(97, 120)) for step in (_metaspace(each), _split("."))]
    ),
    "letters in two parts": _content(normalizer=[_replace("a", "a" * 5000)], pre_tokenizer=[BYTES]),
    "steps": _content(normalizer=[{"type": "StripAccents"}] * 1001),
    "special tokens": _content(post_processor=[_template(*SPECIAL, "A", ids=200)]),
    "texts of texts": _content(post_processor=[_template("A", "A", "A")] * 20),
    "decoded without a suffix": _content(decoder=[{"type": "BPEDecoder", "suffix": ""}] * 40),
    "decoded without a delimiter": _content(
        decoder=[{"type": "CTC", "pad_token": "|", "word_delimiter_token": "", "cleanup": False}] * 40
    ),
    "decoded in another order": _content(decoder=[_replace("a", "bb"), {"type": "Fuse"}, _replace("b", "aa")] * 20),
}


def _check(content: dict[str, Any], tokens: list[str]) -> None:
    check_prompts(content)
    check_texts(content, tokens)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_steps_are_no_growth(name: str) -> None:
    _check(PUBLISHED[name], ["a", " " * 1024])


@pytest.mark.parametrize("name", GROWING)
def test_steps_that_make_a_text_much_longer_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"its .* more than"):
        _check(GROWING[name], ["a"])


def test_long_words_are_looked_up_by_no_model() -> None:
    check_prompts({"model": {"type": "WordPiece", "max_input_chars_per_word": 100}})
    with pytest.raises(ValueError, match="its max_input_chars_per_word=1000000000 is more than 1000; lower it"):
        check_prompts({"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9}})


def test_long_tokens_are_refused_by_what_is_decoded_of_them() -> None:
    content = _content(decoder=[_replace("a", "bbb")])
    check_texts(content, ["a" * 3000])
    with pytest.raises(ValueError, match="more than 10000 letters of the token 'aaaa"):
        check_texts(content, ["a", "a" * 4000, "b"])


@pytest.mark.parametrize(
    "expression", ["x*", "x?|y", "(x|)", "x{0,3}", "x{2}?", "[[:alpha:]]*", "[a[b]]*", "\\b", "x\\K"]
)
def test_an_expression_that_may_match_nothing_writes_between_letters(expression: str) -> None:
    with pytest.raises(ValueError, match="more than"):
        check_prompts(_content(normalizer=[_replace(expression, "y", "Regex")] * 10))


@pytest.mark.parametrize("expression", ["(x)", "(“|”)", "(?:a|b)+", r"(\r\n|\r)", r"\p{L}", "[[:alpha:]]", "( ?)n't"])
def test_an_expression_that_takes_a_letter_writes_in_its_place(expression: str) -> None:
    check_prompts(_content(normalizer=[_replace(expression, "y", "Regex")] * 30))


def test_compatible_forms_grow_once() -> None:
    steps = [{"type": kind} for kind in ("NFKC", "Lowercase", "NFKD", "StripAccents", "NFKC")]
    check_prompts(_content(normalizer=[*steps, {"type": "Lowercase"}, {"type": "NFKC"}]))
    with pytest.raises(ValueError, match="more than"):  # each replacement may bring a letter of 18
        check_prompts(_content(normalizer=[_replace("a", "\ufdfa"), {"type": "NFKC"}] * 4))


def test_steps_that_are_nested_deep_are_refused() -> None:
    steps: dict[str, Any] = {"type": "Replace", "pattern": {"String": "T"}, "content": "TT"}
    for _ in range(30):
        steps = {"type": "Sequence", "normalizers": [steps]}
    with pytest.raises(ValueError, match="nested too deep"):
        check_prompts({"normalizer": steps})


def test_a_library_that_panics_is_one_line(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    endless = "(?:a|aa)+(?!a|\\z)"
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace(Regex("."), "a"), decoders.Replace(Regex(endless), "x")]
    )
    with pytest.raises(ValueError, match="tokens cannot be decoded") as caught:
        text_of(tokenizer, [5] * 60)
    assert len(str(caught.value).splitlines()) == 1
    assert text_of(tokenizer, [5]) == "a"
