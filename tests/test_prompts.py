"""What counts as a prompt: what tokenizers return, masks, and chats that begin the answer."""

from __future__ import annotations

import resource
import sys
from time import thread_time
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

import dllm
from byte_words import byte_tokenizer, prefixing_tokenizer
from dllm.decoding.prompts import encode
from dllm.tasks.tokenizer import build_tokenizer
from models import random_dream, random_llada

LM = random_llada(tokenizer=True)
TEXTS = ["Tom has 23 apples. He buys 12.", "Sam has 5 pens.", "Ann"]
SHORT: dict[str, Any] = {"gen_length": 8, "block_length": 4, "seed": 0}
ROLES = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|turn|>{% endfor %}"
TURNS = ROLES + "{% if add_generation_prompt %}<assistant>{% endif %}"
TRIMMING = TURNS.replace("m['content']", "m['content'] | trim")


def words(template: Any = None, side: str = "left", **special: str) -> Any:
    made = build_tokenizer()
    made.padding_side, made.chat_template = side, template
    for name, token in special.items():
        setattr(made, name, token)
    return made


class TestTokenized:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("kind", [None, "pt", "np"])
    def test_what_a_tokenizer_returns_is_what_the_texts_are(self, kind: str | None, side: str) -> None:
        made = words(side=side)
        expected = [made(text).input_ids for text in TEXTS]
        batch = made(TEXTS, padding=True, return_tensors=kind)
        for given, mask in (
            (batch, None), (dict(batch), None), ({"input_ids": batch["input_ids"]}, batch["attention_mask"]),
            (batch["input_ids"], batch["attention_mask"]), (list(batch["input_ids"]), list(batch["attention_mask"])),
        ):  # fmt: skip
            assert encode(given, made, mask) == expected
        assert encode(made(TEXTS[0], return_tensors=kind), made) == expected[:1]
        assert encode(made(TEXTS), made) == expected

    @pytest.mark.parametrize("make", [random_llada, random_dream])
    def test_every_way_to_generate_takes_them(self, make: Any) -> None:
        lm = make(tokenizer=True)
        batch = lm.tokenizer(TEXTS, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = batch["input_ids"].int(), batch["attention_mask"].bool()
        expected = dllm.generate(lm, TEXTS, **SHORT).sequences
        assert torch.equal(dllm.generate(lm, batch, **SHORT).sequences, expected)
        assert torch.equal(dllm.generate(lm, ids, attention_mask=mask, **SHORT).sequences, expected)
        *_, last = dllm.stream(lm, ids, attention_mask=mask, **SHORT)
        assert torch.equal(last.tokens, expected)
        answers = {a.index: a.completion for a in dllm.as_completed(lm, ids, attention_mask=mask, **SHORT)}
        assert [answers[row] for row in range(3)] == expected[:, -8:].tolist()
        holes = [text.replace(text[:3], lm.tokenizer.mask_token) for text in TEXTS]
        filled = lm.tokenizer(holes, padding=True, return_tensors="pt")
        for given, more in ((filled, {}), (filled["input_ids"], {"attention_mask": filled["attention_mask"]})):
            assert dllm.infill(lm, given, **more).texts == dllm.infill(lm, holes).texts

    def test_ids_of_other_types(self) -> None:
        for given in (
            torch.tensor([[4, 5]], dtype=torch.int32), np.array([[4, 5]], dtype=np.uint8), [torch.tensor([4, 5])],
            [np.array([4, 5])], [[np.int64(4), 5]], [(4, 5)],
        ):  # fmt: skip
            assert encode(given, None) == [[4, 5]]

    @pytest.mark.parametrize(
        "given",
        [
            [[True, False]], [[4.0, 5.0]], [[4, True]], torch.tensor([[True]]), torch.tensor([[4.0]]),
            np.array([[True]]), np.array([[4.5]]), [np.array([4.5])], [torch.tensor([True])], {"ids": [[4]]},
            torch.tensor([4]), torch.tensor([[[4]]]), {"role": "user", "content": "Hi"},
            {"input_ids": "Hi"}, {"input_ids": b"Hi"},
        ],
        ids=str,
    )  # fmt: skip
    def test_what_is_no_list_of_ids_is_refused(self, given: Any) -> None:
        with pytest.raises(ValueError, match=r"^prompts"):
            encode(given, LM.tokenizer)


class TestMask:
    @pytest.mark.parametrize(
        ("mask", "named"),
        [
            ([[1, 0, 1]], "between tokens"),
            ([[1, 1]], "does not fit the 3 tokens"),
            ([[1, 1, 2]], "does not fit"),
            ([1, 1, 1], "3 rows for 1 prompts"),
            (torch.ones(2, 3), "2 rows for 1 prompts"),
            (torch.ones(3), "3 rows for 1 prompts"),
            ([[[1], [1], [1]]], "does not fit"),
        ],
    )
    def test_one_that_does_not_fit_is_refused(self, mask: Any, named: str) -> None:
        with pytest.raises(ValueError, match=rf"^attention_mask.*{named}"):
            dllm.generate(LM, torch.tensor([[4, 5, 6]]), attention_mask=mask, **SHORT)

    def test_it_is_for_token_ids_and_given_once(self) -> None:
        with pytest.raises(ValueError, match=r"attention_mask is for token ids, and prompts\[0\]"):
            encode(["Tom"], LM.tokenizer, [[1]])
        with pytest.raises(ValueError, match=r"attention_mask is given twice"):
            encode(LM.tokenizer(["Tom"]), LM.tokenizer, [[1]])

    def test_a_tensor_that_may_be_padded_is_refused_without_one(self) -> None:
        batch = LM.tokenizer(TEXTS, padding=True, return_tensors="pt")
        for given in (batch["input_ids"], batch["input_ids"].numpy(), list(batch["input_ids"])):
            with pytest.raises(ValueError, match=r"^prompts\[1\] begins or ends with token id 0.*give attention_mask"):
                dllm.generate(LM, given, **SHORT)
        ones = torch.ones_like(batch["input_ids"])
        assert encode(batch["input_ids"], LM.tokenizer, ones) == batch["input_ids"].tolist()
        assert encode([[0, 5], [0, 6]], LM.tokenizer) == [[0, 5], [0, 6]]

    def test_a_padding_token_that_ends_no_text_is_padding(self) -> None:
        made = words(pad_token="<|unk|>")
        pad = made.pad_token_id
        rows = torch.tensor([[pad, pad, 7], [4, pad, 6], [4, 5, pad], [pad] * 3])
        assert encode(rows, made, eos_token_ids=(0,)) == [[7], [4, pad, 6], [4, 5], []]

    @pytest.mark.parametrize("more", [{}, {"eos_token_id": 20}, {"stop": "e"}])
    def test_a_result_is_continued_with_its_own(self, more: dict[str, Any]) -> None:
        prompts = [[4, 5, 6], [7], [9, 10]]
        first = dllm.generate(LM, prompts, **SHORT | more)
        counts = first.attention_mask.sum(1).tolist()
        whole = [
            prompt + completion[: count - len(prompt)]
            for prompt, completion, count in zip(prompts, first.completions.tolist(), counts, strict=True)
        ]
        assert sum(counts) == first.stats.tokens + 6
        second = dllm.generate(LM, first.sequences, attention_mask=first.attention_mask, **SHORT | more)
        assert second.texts == dllm.generate(LM, whole, **SHORT | more).texts
        with pytest.raises(ValueError, match="give attention_mask"):
            dllm.generate(LM, first.sequences, **SHORT | more)

    def test_a_filled_text_is_all_tokens(self) -> None:
        mask = LM.backbone.mask_token_id
        result = dllm.infill(LM, [[4, mask, 0, 6], [mask]])
        assert result.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]


def written(chat: list[dict[str, Any]], template: str = TURNS) -> str:
    made = byte_tokenizer()
    made.chat_template = template
    return str(made.decode(encode([chat], made)[0]))


USER = {"role": "user", "content": "Tom has 5 pens."}


class TestChats:
    def test_one_that_ends_with_the_beginning_of_an_answer_is_continued(self) -> None:
        begun = [USER, {"role": "assistant", "content": "The answer is "}]
        assert written(begun) == written([USER]) + "The answer is "
        assert written(begun, TRIMMING) == written([USER]) + "The answer is"
        assert written([USER, begun[1], USER]).endswith("<assistant>")
        two = words(TURNS)
        assert encode([begun, [USER]], two) == [*encode([begun], two), *encode([[USER]], two)]

    def test_only_what_follows_is_the_answer(self) -> None:
        lm = random_llada(tokenizer=True)
        assert lm.tokenizer is not None
        lm.tokenizer.chat_template = TURNS
        prefix = lm.tokenizer("<user>Tom has 5 pens.<|turn|><assistant>The answer", add_special_tokens=False)
        chat = [USER, {"role": "assistant", "content": "The answer"}]
        assert dllm.generate(lm, chat, **SHORT).texts == dllm.generate(lm, prefix, **SHORT).texts

    @pytest.mark.parametrize("model", ["tiny-llada", "tiny-dream", "tiny-block"])
    def test_bundled_models_keep_the_question_of_an_answer_that_is_begun(self, model: str) -> None:
        question = "Tom has 23 apples. He buys 12. How many apples does he have?"
        lm = dllm.load(model, device="cpu")
        begun = [{"role": "user", "content": question}, {"role": "assistant", "content": " 23 + 12"}]
        assert lm.tokenizer is not None
        assert encode([begun], lm.tokenizer) == encode([f"{question} 23 + 12"], lm.tokenizer)

    @pytest.mark.parametrize("content", ["", None, [], " \n", [{"type": "text", "text": ""}]])
    def test_a_beginning_without_text_is_none(self, content: Any) -> None:
        assert written([USER, {"role": "assistant", "content": content}]) == written([USER])

    def test_parts_of_text_are_text(self) -> None:
        parts = [{"type": "text", "text": "Tom has"}, {"type": "text", "text": " 5 pens."}]
        assert written([{**USER, "content": parts}]) == written([USER])
        begun = {"role": "assistant", "content": [{"type": "text", "text": "The answer"}]}
        assert written([USER, begun]) == written([USER]) + "The answer"

    def test_other_fields_reach_the_template(self) -> None:
        template = (
            "{% for m in messages %}{{ m.get('name', '') }}{{ m['content'] }}{{ m.get('tool_calls', '') }}{% endfor %}"
        )
        assert written([{**USER, "name": "Tom"}], template) == "TomTom has 5 pens."
        called = {"role": "assistant", "content": None, "tool_calls": "apples"}
        assert written([USER, called, {"role": "tool", "content": "5"}], template) == "Tom has 5 pens.apples5"

    @pytest.mark.parametrize(
        ("template", "named"),
        [
            (
                "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
                "takes more than 0.2 seconds",
            ),
            ("{{ 9 ** 9 ** 9 }}", r"computes a power \(\*\*\)"),
        ],
    )
    def test_a_template_that_takes_forever_is_ended(
        self, template: str, named: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dllm.decoding.chats._SECONDS", 0.2)
        for tokenizer in (words(template), words({"default": template})):
            with pytest.raises(ValueError, match=rf"^prompts\[0\] does not fit the chat template: it {named}$"):
                encode([[USER]], tokenizer)
        with pytest.raises(ValueError, match="does not fit the chat template: "):
            written([USER], "{{ 2 ** '")
        for template in (
            "{# 2 ** 3 #}{{ '**'[2:] }}{{ messages[0]['content'] }}",
            "{% macro turn(role, content) %}{{ content }}{% endmacro %}{{ turn(**messages[0]) }}",
            "{{ dict(messages[0], **{'role': 'a'})['content'] }}",
        ):
            assert written([USER], template) == "Tom has 5 pens."
        markdown = "**{{ messages[0]['role'] }}**{{ messages[0]['content'] }}{% raw %}**{% endraw %}"
        assert written([USER], markdown) == "**user**Tom has 5 pens.**"

    def test_reading_a_long_template_counts_as_its_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dllm.decoding.chats._SECONDS", 0.2)
        begun = thread_time()
        with pytest.raises(ValueError, match=r"does not fit the chat template: it takes more than 0.2 seconds"):
            written([USER], "{{ 1 }}" * 400_000)
        assert thread_time() - begun < 1

    @pytest.mark.skipif(sys.platform != "linux", reason="the memory of a thread's work is limited on Linux alone")
    @pytest.mark.parametrize(
        "template",
        [
            "{{ 'a' * 10000000000000 }}",
            "{{ '%10000000000d' % 1 }}",
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        ],
    )
    def test_a_template_that_takes_much_memory_is_ended(self, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dllm.decoding.chats._BYTES", 1 << 26)
        before = resource.getrlimit(resource.RLIMIT_DATA)
        with pytest.raises(ValueError, match="does not fit the chat template: it takes too much memory"):
            written([USER], template)
        assert resource.getrlimit(resource.RLIMIT_DATA) == before

    @pytest.mark.parametrize(
        ("chat", "template", "named"),
        [
            ([USER, {"role": "assistant", "content": "The pens"}], TURNS.replace("m['content']", "m['content']|upper"),
             "does not fit the chat template: .*partial answer"),
            ([USER], "{{ raise_exception('no\nusers') }}", "does not fit the chat template: no users"),
            ([USER], "{{ 'a' + 5 }}", "does not fit the chat template: "),
            ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], TURNS,
             "has content of type 'image_url'; give text"),
            ([{"role": "user", "content": [{"type": "text"}]}], TURNS, "has content of type 'text'"),
            ([{"role": "user", "content": 5}], TURNS, "is a list"),
            ([{"role": "user"}], TURNS, "is a list"),
            ([{"content": "Hi"}], TURNS, "is a list"),
        ],
        ids=range(8),
    )  # fmt: skip
    def test_what_cannot_be_written_is_refused_in_one_line(self, chat: Any, template: str, named: str) -> None:
        with pytest.raises(ValueError, match=rf"^prompts\[1\] {named}") as caught:
            encode([[4], chat], words(template))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["metaspace", "llama", "byte_level"])
def test_what_follows_a_mask_is_given_as_it_is(kind: str) -> None:
    made = prefixing_tokenizer(kind)
    made.chat_template = ROLES.replace("<|turn|>", "")
    begin, mask = ("Ġ" if kind == "byte_level" else "▁"), made.mask_token
    for prompt in (f"2{mask}4 5{mask}{mask} 6", [{"role": "user", "content": f"2{mask}4 5{mask}{mask} 6"}]):
        (ids,) = encode([prompt], made)
        pieces = made.convert_ids_to_tokens(ids)
        assert pieces[pieces.index("2") :] == ["2", mask, "4", begin, "5", mask, mask, begin, "6"]


@pytest.mark.parametrize("prompt", ["a\ud800", [{"role": "user", "content": "a\ud800"}]], ids=["text", "chat"])
def test_halves_of_characters_are_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"^prompts\[0\] contains lone surrogates"):
        encode([prompt], build_tokenizer())


def test_a_text_that_the_tokenizer_gives_up_on_is_refused() -> None:
    tokenizer: Any = build_tokenizer()
    endless = Split(Regex(r"(([a-z]+)+)+\d"), "isolated")  # tries every way to split a word
    tokenizer.backend_tokenizer.pre_tokenizer = endless
    with pytest.raises(ValueError, match=r"^prompts\[0\] cannot be tokenized \(.*retry-limit.*\); give another text"):
        encode(["a" * 60], tokenizer)
    assert encode(["7"], tokenizer) != [[]]


def test_a_word_that_the_tokenizer_has_nothing_for_is_refused() -> None:
    tokenizer: Any = build_tokenizer()
    tokenizer.backend_tokenizer.model = WordLevel({"a": 0}, unk_token="nothing")
    with pytest.raises(ValueError, match=r"^prompts\[0\] cannot be tokenized \(.*UNK.*\); give another text"):
        encode(["zebra"], tokenizer)


def test_a_mask_without_a_name_is_told_by_its_id() -> None:
    lm = random_llada(tokenizer=True)
    assert lm.tokenizer is not None
    lm.tokenizer.mask_token = None
    with pytest.raises(ValueError, match=rf"put one \(id {lm.backbone.mask_token_id}\)"):
        dllm.infill(lm, [[5, 6]])


@pytest.mark.parametrize("content", ["", " \n", None, [], [{"type": "text", "text": ""}]])
def test_a_chat_of_one_empty_answer_is_refused(content: Any) -> None:
    tokenizer = random_llada(tokenizer=True).tokenizer
    with pytest.raises(ValueError, match=r"^prompts\[0\] has only an empty assistant message; give the message"):
        encode([{"role": "assistant", "content": content}], tokenizer)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ cycler().next() }}", "at least one item has to be provided"),
        ("{{ 'a' * 1000000000000000 }}", "it takes too much memory"),
        ("{% import 'os' as os %}", "no loader for this environment specified"),
        ("{% for", "unexpected 'end of template'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deep"),
        (5, "Can't compile non template nodes"),
    ],
)
def test_a_template_that_fails_is_told_in_one_line(template: Any, said: str) -> None:
    tokenizer = random_llada(tokenizer=True).tokenizer
    assert tokenizer is not None
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="does not fit the chat template: ") as refusal:
        encode([{"role": "user", "content": "Sam"}], tokenizer)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
