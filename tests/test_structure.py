"""Answers with a response format: always of it, whatever decodes them, and without effect on other rows."""

from __future__ import annotations

import json
import random
import re
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tokenizers import normalizers

import dllm
from byte_words import prefixing_tokenizer
from dllm import samplers
from dllm.decoding.engine import Engine
from dllm.decoding.window import Edit, Window
from dllm.models import FAMILIES
from dllm.samplers.base import Denoise, Policy, commit
from dllm.samplers.selection import top
from models import random_diffusion_gemma, random_filter, random_guide, random_llada
from structure_rig import SUMS, compiled_here, text_model
from toys import Editing as RewritingEarlier
from toys import Revoking

jsonschema = pytest.importorskip("jsonschema")
lark = pytest.importorskip("lark")
pytest.importorskip("outlines_core")
from dllm.structure import compiled  # noqa: E402

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
NUMBER = {"type": "regex", "regex": "[0-9]+"}
CHOICES = ["yes", "no", "not at all", "€ß😀"]
OPTIONS: dict[str, Any] = {"gen_length": 48, "block_length": 16, "seed": 0}


def random_schema(source: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema with the keywords that are supported."""
    kinds = ["integer", "bounded", "string", "boolean", "null", "const", "enum", "nullable", "number"]
    match source.choice(kinds + ["object", "array"] * 2 * (depth > 0)):
        case "integer":
            return {"type": "integer"}
        case "bounded":
            low = source.randrange(-120, 1200)
            return {"type": "integer", "minimum": low, "maximum": low + source.randrange(300)}
        case "number":
            return {"type": "number", "exclusiveMinimum": source.randrange(-3, 3), "maximum": 4}
        case "string":
            low = source.randrange(3)
            return {"type": "string", "minLength": low, "maxLength": low + source.randrange(4)}
        case "const":
            return {"const": source.choice(["é\n", 3, None, {"a": [1, 'b"']}, -0.5])}
        case "enum":
            return {"enum": source.sample(["red", "", 'a"b', 7, True, None, ["x"]], 3)}
        case "nullable":
            return {"anyOf": [random_schema(source, depth - 1), {"type": "null"}]}
        case "array":
            low = source.randrange(2)
            return {
                "type": "array", "items": random_schema(source, depth - 1), "minItems": low,
                "maxItems": low + source.randrange(3),
            }  # fmt: skip
        case "object":
            names = source.sample(["a", "b c", 'q"', "é", "long name"], source.randrange(1, 4))
            properties = {name: random_schema(source, depth - 1) for name in names}
            return {"type": "object", "properties": properties, "required": names[: source.randrange(len(names) + 1)]}
        case kind:
            return {"type": kind}


def policies() -> dict[str, Any]:
    """Those that need no file."""
    return {
        "adablock": samplers.AdaBlock(threshold=0.5, delimiters=(",",)),
        "anchored": samplers.Anchored(),
        "certainty": samplers.Certainty(),
        "credit": samplers.Credit(threshold=0.5),
        "eb": samplers.EB(gamma=1.0),
        "edit": samplers.Editing(editing_threshold=0.3),
        "entropy_threshold": samplers.EntropyThreshold(),
        "factor": samplers.Factor(),
        "freedave": samplers.FreeDave(base=samplers.Threshold(0.5)),
        "hierarchical": samplers.Hierarchical(threshold=0.6, low_threshold=0.2),
        "klass": samplers.KLASS(threshold=0.4, kl_threshold=1.0),
        "localleap": samplers.LocalLeap(threshold=0.5, relaxed_threshold=0.3),
        "lopa": samplers.LoPA(threshold=0.4),
        "multiblock": samplers.MultiBlock(base=samplers.Threshold(0.3), threshold=0.3),
        "oracle": samplers.Oracle(),
        "prophet": samplers.Prophet(early=0.5, mid=0.5, late=0.5),
        "remdm": samplers.ReMDM(eta=0.3),
        "saber": samplers.Saber(),
        "slowfast": samplers.SlowFast(threshold=0.3, exploration=2),
        "ssd": samplers.SSD(base=samplers.Threshold(0.5)),
        "sub_blocks": samplers.SubBlocks(base=samplers.Threshold(0.3)),
        "t2m": samplers.T2M(threshold=0.3),
        "threshold": samplers.Threshold(0.2),
        "vanilla": samplers.Vanilla(),
        "vanilla, 4 tokens a step": samplers.Vanilla(steps=12),
        "wino": samplers.Wino(wide_in=0.2, narrow_out=0.5),
        "rewriting": RewritingEarlier(),
        "revoking": Revoking(),
    }


@pytest.fixture(autouse=True)
def _compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_written", compiled_here)


@pytest.mark.parametrize("base", ["threshold", "vanilla"])
def test_replaced_tokens_do_not_keep_masks_from_being_filled(base: str) -> None:
    # Each of two tokens is better than the other as long as the mask beside them is not filled.
    lm, options = text_model(seed=1), {"gen_length": 8, "temperature": 1.0, "top_p": 0.1, "seed": 0}
    for threshold in (0.0, 0.3):
        edit, answers = samplers.Editing(editing_threshold=threshold, base=base), ["a b c", "b a", "cc"]
        form = {"type": "choice", "choice": answers}
        assert dllm.generate(lm, "Hi", edit, response_format=form, **options).texts[0] in answers


@pytest.mark.parametrize("name", policies())
def test_every_answer_of_a_random_schema_parses_and_is_valid(name: str) -> None:
    source = random.Random(name)
    lm = text_model("dream" if source.random() < 0.5 else "llada")
    cache = (
        "none"
        if name in ("lopa", "freedave", "ssd", "wino", "revoking", "rewriting")
        else source.choice(["none", "block", "dkv", "dual", "prefix", "freecache"])
    )
    with Engine(lm, policies()[name], cache, batch_size=6, max_length=160) as engine:
        schemas: dict[int, Any] = {}
        while len(schemas) < 11:
            schema = random_schema(source)
            length = min(source.choice([20, 40, 64, 96]), 96)
            block = source.choice([8, 16, 32])
            form = {"type": "json_schema", "schema": schema}
            try:
                if name == "vanilla, 4 tokens a step":
                    length, block = 48, 16
                number = engine.add(
                    "Hi" * source.randrange(5), gen_length=length, block_length=block, seed=0, response_format=form,
                    temperature=source.choice([0.0, 1.0]),
                )  # fmt: skip
            except ValueError as error:
                if "needs at least" not in str(error):
                    raise
                continue
            schemas[number] = schema
        answers = {event.id: event.answer for step in engine.steps() for event in step if event.answer}
    for number, schema in schemas.items():
        answer = answers[number]
        assert answer.error is None
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))


@pytest.mark.parametrize(
    ("form", "right"),
    [
        ({"type": "json_object"}, lambda text: isinstance(json.loads(text), dict)),
        ({"type": "regex", "regex": "^(ab|ba)+[0-9]{2}é?$"}, re.compile("(ab|ba)+[0-9]{2}é?").fullmatch),
        ({"type": "choice", "choice": CHOICES}, CHOICES.__contains__),
    ],
)
def test_objects_expressions_and_choices(form: dict[str, Any], right: Any) -> None:
    for sampler in ("vanilla", samplers.Threshold(0.1)):
        out = dllm.generate(text_model(), ["a", "bc", "d"], sampler, response_format=form, temperature=1.0, **OPTIONS)
        assert all(map(right, out.texts)), out.texts


def test_other_rows_of_the_batch_are_unchanged() -> None:
    lm, prompts = text_model(), ["Hello", "Hi you", "a b c"]
    plain = dllm.generate(lm, prompts, "threshold", **OPTIONS)
    with Engine(lm, "threshold", batch_size=3, max_length=64) as engine:
        for number, prompt in enumerate(prompts):
            own = OPTIONS | {"seed": number}
            engine.add(prompt, response_format=FORMAT if number == 1 else None, **own)
        answers = {event.id: event.answer for step in engine.steps() for event in step if event.answer}
    alone = dllm.generate(lm, [prompts[1]], "threshold", response_format=FORMAT, **OPTIONS | {"seed": 1})
    for number in (0, 2):
        assert answers[number].completion == plain.completions[number].tolist()
    assert answers[1].completion == alone.completions[0].tolist()


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.FreeDave(3, "entropy_threshold"),
        samplers.FreeDave(3, samplers.Vanilla(order="random")),
        samplers.SSD(3),
        samplers.Vanilla(4, schedule="timestep"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("held", [False, True])
def test_a_row_may_join_others_without_a_format_or_with_one(sampler: Any, held: bool) -> None:
    lm = text_model()

    def answer(beside: bool) -> Any:
        with Engine(lm, sampler, batch_size=2, max_length=64) as engine:
            if beside:
                engine.add("Hi you", response_format=FORMAT if held else None, **OPTIONS | {"seed": 5})
                engine.step()
            number = engine.add("Hello", response_format=FORMAT, **OPTIONS | {"block_length": 12, "seed": 1})
            answers = {event.id: event.answer for step in engine.steps() for event in step if event.answer}
        assert not any(each.error for each in answers.values())
        return answers[number]

    alone, joined = answer(False), answer(True)
    assert (joined.completion, joined.nfe) == (alone.completion, alone.nfe)


@pytest.mark.parametrize("base", [samplers.Vanilla(), samplers.Vanilla(steps=12), samplers.Threshold(0.4)])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_lossless_drafts_give_the_answers_of_their_base(base: Any, kind: str) -> None:
    prompts, options = ["Hello", "Hi you", "a"], {**OPTIONS, "response_format": FORMAT}
    lm = text_model(kind)
    want = dllm.generate(lm, prompts, base, "prefix", **options)
    for drafting in (
        samplers.FreeDave(base=base),
        samplers.FreeDave(base=base, draft_mode="tree"),
        samplers.SSD(base=base),
    ):
        out = dllm.generate(lm, prompts, drafting, "prefix", **options)
        assert torch.equal(out.completions, want.completions)
        assert (out.nfe <= want.nfe).all()


@pytest.mark.parametrize(
    "sampler", [samplers.LoPA(0.2), samplers.LoPA(0.2, weight=0.0), samplers.Credit(0.2)], ids=repr
)
def test_tokens_are_settled_in_the_order_of_the_confidence_that_commits_them(sampler: Any) -> None:
    form = {"type": "regex", "regex": "^(ab|ba)+[0-9]{2}é?$"}
    asked = {"response_format": form, "gen_length": 48, "block_length": 16, "seed": 0}
    # This model predicts each position whatever stands at the others, so that branches change nothing.
    texts = [
        dllm.generate(text_model("llada", sharpness=5.0), ["Hello", "Hi you"], each, "none", **asked).texts
        for each in (samplers.Threshold(0.2), sampler)
    ]
    assert texts[0] == texts[1]
    assert all(re.fullmatch(form["regex"], text) for text in texts[0])


def test_tokens_after_the_end_are_end_of_text() -> None:
    lm = text_model()
    out = dllm.generate(
        lm, "Hi", "vanilla", stop_at_eos=False, response_format={"type": "choice", "choice": ["yes"]}, **OPTIONS
    )
    end = lm.backbone.eos_token_ids[0]
    assert out.texts == ["yes"]
    assert (out.completions[0, 3:] == end).all()
    assert (out.completions[0, :3] != end).all()


def test_refusals_and_time_are_counted() -> None:
    lm = text_model()
    out = dllm.generate(
        lm, ["Hello"], samplers.Prophet(early=0.0, mid=0.0, late=0.0), response_format=FORMAT, **OPTIONS
    )
    assert out.stats.constraint_refusals > 0
    assert 0 < out.stats.constraint_seconds < out.stats.seconds
    plain = dllm.generate(lm, ["Hello"], **OPTIONS)
    assert (plain.stats.constraint_refusals, plain.stats.constraint_seconds) == (0, 0.0)


def test_an_early_end_leaves_a_complete_answer() -> None:
    lm = text_model()
    end = lm.backbone.eos_token_ids[0]
    with torch.no_grad():  # a model that wants to end at once
        head = lm.backbone.get_output_embeddings().weight
        kept = head[end].clone()
        head[end] *= 0
        head[end] += 5 * head.abs().amax(0) * head.mean(0).sign()
    try:
        for sampler in ("vanilla", samplers.Threshold(0.1)):
            out = dllm.generate(lm, ["Hello", "a"], sampler, response_format=FORMAT, **OPTIONS)
            for text in out.texts:
                jsonschema.validate(json.loads(text), PERSON)
    finally:
        with torch.no_grad():
            head[end] = kept


def test_infilled_texts_match_as_a_whole() -> None:
    lm = text_model()
    mask = lm.tokenizer.mask_token
    text = '{"name": "' + mask * 6 + '", "age": ' + mask * 3 + "}"
    out = dllm.infill(lm, [text], samplers.Threshold(0.1), response_format=FORMAT, seed=0)
    assert out.texts[0].startswith('{"name": "')
    jsonschema.validate(json.loads(out.texts[0]), PERSON)
    with pytest.raises(ValueError, match=r"prompts\[0\] cannot be completed to a text of response_format"):
        dllm.infill(lm, [f"hello {mask}"], response_format=FORMAT)


def test_streams_and_answers_as_completed_have_the_format() -> None:
    lm = text_model()
    *_, last = dllm.stream(lm, ["a", "b"], "threshold", response_format=FORMAT, **OPTIONS)
    want = dllm.generate(lm, ["a", "b"], "threshold", response_format=FORMAT, **OPTIONS)
    assert np.array_equal(last.tokens[:, -48:], want.completions)
    for answer in dllm.as_completed(lm, ["a", "b"], "threshold", response_format=FORMAT, **OPTIONS):
        jsonschema.validate(json.loads(answer.text), PERSON)


@pytest.mark.parametrize("length", [48, "auto"])
def test_a_canvas_that_grows_ends_with_a_complete_answer(length: int | str) -> None:
    lm, options = text_model(), OPTIONS | {"gen_length": length, "response_format": FORMAT}
    for policy in (
        samplers.Daedal(initial=2, factor=4, check_positions=8, low=0.9, expand=1.0),
        samplers.Daedal(initial=16, check_positions=8),
    ):
        for text in dllm.generate(lm, ["a", "bc"], policy, **options).texts:
            jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize(
    "rule",
    [{}, {"on_reject": "guide"}, {"accept": "sample"}, {"accept": "topk", "top_k": 5, "on_reject": "guide"}],
)
def test_tokens_of_a_guide_are_held_to_the_format(rule: dict[str, Any]) -> None:
    lm = text_model()
    policy = samplers.ARGuided(random_guide(lm.backbone.logits_size), **rule)
    out = dllm.generate(lm, ["a", "bc"], policy, response_format=FORMAT, temperature=0.5, **OPTIONS)
    for text in out.texts:
        jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("eotp", ["off", "published", "accepted", "safe"])
def test_what_a_policy_cuts_off_is_not_needed(eotp: Any) -> None:
    lm = text_model()
    policy = samplers.Learn2PD(random_filter(), threshold=0.2, eotp=eotp, allow_mismatch=True)
    out = dllm.generate(lm, ["a", "bc", "d"], policy, response_format=FORMAT, **OPTIONS)
    for text in out.texts:
        jsonschema.validate(json.loads(text), PERSON)


@dataclass(frozen=True)
class Cutting(Policy):
    """Ends every row in the middle, whatever is left."""

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        prediction = denoise()
        end = window.start + window.span // 2
        return replace(commit(window, prediction, top(prediction.confidence, 1, window.masked)), end=end)


def test_a_row_does_not_end_before_its_answer_does() -> None:
    lm = text_model()
    for length in (24, 30, 64):
        out = dllm.generate(lm, ["a"], Cutting(), response_format=FORMAT, **OPTIONS | {"gen_length": length})
        jsonschema.validate(json.loads(out.texts[0]), PERSON)
    ends = out.completions[0] == lm.backbone.eos_token_ids[0]
    assert ends[32:].all()


@pytest.mark.skipif("diffusion_gemma" not in FAMILIES, reason="needs transformers 5.13")
def test_a_policy_over_random_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="response_format is not compatible with a policy over uniformly random"):
        dllm.generate(random_diffusion_gemma(tokenizer=True), "a", "renoise", response_format=NUMBER, gen_length=8)


class TestScaffold:
    SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "home": {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"enum": ["a1", "b22"]}}},
            "age": {"type": "integer", "minimum": 0},
            "kind": {"const": 3},
        },
    }
    FORM: ClassVar[dict[str, Any]] = {"type": "json_schema", "schema": SCHEMA, "scaffold": True}

    @pytest.mark.parametrize("lengths", [None, 5, {"name": 4, "home.city": 9}])
    @pytest.mark.parametrize("sampler", ["vanilla", samplers.Threshold(0.1), samplers.FreeDave()])
    def test_values_are_filled_between_what_is_given(self, lengths: Any, sampler: Any) -> None:
        lm = text_model()
        form = self.FORM if lengths is None else self.FORM | {"value_length": lengths}
        out = dllm.generate(lm, ["Hello", "ab"], sampler, response_format=form, gen_length=96, seed=0)
        for text in out.texts:
            answer = json.loads(text)
            jsonschema.validate(answer, self.SCHEMA)
            assert list(answer) == ["name", "home", "age", "kind"]
            assert re.fullmatch(
                r'\{"name": ".*" *, "home": \{"city": ".*" *, "zip": .*\}, "age": .*, "kind": 3\}', text
            )
        if lengths is None:
            assert out.completions.shape[1] == 96

    @pytest.mark.parametrize("kind", ["metaspace", "llama", "byte_level"])
    def test_tokenizers_that_put_a_space_before_a_text_put_none_into_it(self, kind: str) -> None:
        words = prefixing_tokenizer(kind)
        lm = replace(random_llada(len(words), sharpness=5.0), tokenizer=words)
        (text,) = dllm.generate(lm, ["Hello"], "threshold", response_format=self.FORM, gen_length=96, seed=0).texts
        jsonschema.validate(json.loads(text), self.SCHEMA)
        assert text.startswith('{"name": "')
        (text,) = dllm.infill(lm, "2<|mask|> 4<|mask|>.", response_format={"type": "regex", "regex": " ?2a 4b."}).texts
        assert text.strip() == "2a 4b."
        words.backend_tokenizer.normalizer = normalizers.Lowercase()
        form = {"type": "json_schema", "schema": {"type": "object", "properties": {"A": {"enum": [1, 2]}}}}
        with pytest.raises(ValueError, match=r"gives '\{\"A\": ', which the tokenizer of this model changes; leave"):
            dllm.generate(lm, ["a"], response_format=form | {"scaffold": True}, gen_length=16)

    def test_a_value_has_room_for_each_of_its_texts(self) -> None:
        lm = text_model()
        schema = {"type": "object", "properties": {"a": {"enum": ["abcd", "€€"]}}}  # letters of one token and of three
        form = {"type": "json_schema", "schema": schema, "scaffold": True}
        out = dllm.generate(lm, ["a"], response_format=form, gen_length=40, seed=0)
        assert out.completions.shape[1] == len(lm.tokenizer('{"a": "€€"}').input_ids)

    def test_an_object_without_properties_that_may_be_there_is_empty(self) -> None:
        inner = {"type": "object", "properties": {"x": False}}
        schema = {"type": "object", "properties": {"a": inner, "b": {"type": "integer"}, "c": False}}
        form = {"type": "json_schema", "schema": schema, "scaffold": True}
        (text,) = dllm.generate(text_model(), ["Hi"], response_format=form, gen_length=40, seed=0).texts
        assert json.loads(text)["a"] == {}

    def test_rows_of_one_batch_have_scaffolds_of_their_own(self) -> None:
        lm = text_model()
        forms = [self.FORM, None, FORMAT, self.FORM | {"value_length": 3}]
        with Engine(lm, "threshold", batch_size=4, max_length=128) as engine:
            for form in forms:
                engine.add("Hi", response_format=form, **OPTIONS | {"gen_length": 72})
            answers = {event.id: event.answer for step in engine.steps() for event in step if event.answer}
        for number, schema in ((0, self.SCHEMA), (2, PERSON), (3, self.SCHEMA)):
            jsonschema.validate(json.loads(answers[number].text), schema)

    def test_what_cannot_be_is_refused(self) -> None:
        lm = text_model()

        def refused(named: str, *, infill: bool = False, **options: Any) -> None:
            run = dllm.infill if infill else dllm.generate
            with pytest.raises(ValueError, match=named) as told:
                run(lm, ["a" + lm.tokenizer.mask_token * infill], response_format=self.FORM | options, seed=0)
            assert "\n" not in str(told.value)

        refused("leave it out to infill", infill=True)
        refused(r"value_length.nope is of no value; expected some of age, home.city", value_length={"nope": 3})
        numbers = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1000}}}
        refused("cannot be completed", schema=numbers, value_length=1)
        refused("has no value to fill in", schema={"const": 1})
        refused(
            "a row of 256 leaves 255 beside the prompt; use a smaller response_format.value_length", value_length=10**6
        )
        with pytest.raises(ValueError, match="scaffold needs at least"):
            dllm.generate(lm, ["a"], response_format=self.FORM, gen_length=20)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stop": "x"}, "stop='x' would cut"),
        ({"eos_suppression": "logits"}, "eos_suppression=logits excludes"),
        ({"gen_length": 8}, r"response_format needs at least \d+ tokens; gen_length=8"),
    ],
)
def test_options_that_leave_no_answer_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dllm.generate(text_model(), "a", response_format=FORMAT, **options)


def test_end_of_text_may_be_committed_last() -> None:
    out = dllm.generate(text_model(), ["a", "b"], eos_suppression="confidence", response_format=FORMAT, **OPTIONS)
    for text in out.texts:
        jsonschema.validate(json.loads(text), PERSON)


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="response_format needs a tokenizer"):
        dllm.generate(random_llada(), [[1]], response_format=FORMAT, gen_length=8)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(ValueError, match=r"needs outlines_core; install it with pip install 'dllm-samplers\[s"):
        dllm.generate(text_model(), "a", response_format={"type": "regex", "regex": "abc*d"}, gen_length=8)


@pytest.mark.parametrize("model", ["tiny-llada", "tiny-dream"])
def test_bundled_models_answer_in_the_format(model: str) -> None:
    lm = dllm.load(model)
    regex = r"(So )?[A-Z][a-z]+ has [1-9][0-9]? apples\."
    out = dllm.generate(lm, ["Tom has 23 apples. How many?"] * 2, "threshold", "prefix", response_format={
        "type": "regex", "regex": regex,
    }, gen_length=24, seed=0)  # fmt: skip
    assert all(re.fullmatch(regex, text) for text in out.texts)
    with pytest.raises(ValueError, match="json_object cannot be written with the tokens of this model"):
        dllm.generate(lm, "Tom", response_format={"type": "json_object"})


def test_answers_of_a_grammar_parse() -> None:
    parser = lark.Lark(SUMS)
    form = {"type": "grammar", "grammar": SUMS, "depth": 2}
    for sampler in ("vanilla", samplers.Threshold(0.05)):
        out = dllm.generate(text_model(), ["a", "b", "c"], sampler, response_format=form, temperature=1.0, **OPTIONS)
        for text in out.texts:
            parser.parse(text)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampler", ["threshold", "freedave", "prophet", "wino"])
def test_a_device_gives_the_answers_of_the_cpu(sampler: str) -> None:
    lm, options = text_model(), {**OPTIONS, "response_format": FORMAT}
    want = dllm.generate(lm, ["a", "bc"], sampler, **options)
    there = replace(lm, backbone=deepcopy(lm.backbone).to("cuda"), spare=[])
    assert torch.equal(dllm.generate(there, ["a", "bc"], sampler, **options).completions, want.completions)
