"""Log-probabilities of a stream come with the text that they belong to, and are in sum those of the whole answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import dllm

openai = pytest.importorskip("openai")
for needed in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(needed)

from dllm.samplers import S2D2, FreeDave, LoPA, Threshold  # noqa: E402
from dllm.serving import events  # noqa: E402
from dllm.serving.events import Pieces  # noqa: E402
from dllm.serving.ticket import FinalText  # noqa: E402
from serve_rig import QUESTION, Running, serving  # noqa: E402
from structure_rig import text_model  # noqa: E402

pytestmark = pytest.mark.xdist_group("serve")
MESSAGES = [{"role": "user", "content": QUESTION}]
COMMON: dict[str, Any] = {"model": "tiny-llada", "max_tokens": 64, "seed": 1}


@pytest.fixture(scope="module")
def lm() -> dllm.LanguageModel:
    return dllm.load("tiny-llada", device="cpu")


@pytest.fixture(scope="module")
def server(lm: dllm.LanguageModel) -> Iterator[Running]:
    with serving(lm, block_length=16, samplers=["vanilla", "threshold", "tiny/wino", "tiny/edit"]) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def words(lm: dllm.LanguageModel, tokens: Sequence[str]) -> str:
    """The text of tokens, without the one that ends it."""
    return "".join(tokens).removesuffix(lm.tokenizer.eos_token)


@pytest.mark.parametrize("sampler", ["vanilla", "threshold", "tiny/wino", "tiny/edit"])
@pytest.mark.parametrize("events", [None, "steps"])
def test_chunks_of_a_chat_have_those_of_their_text(
    client: openai.OpenAI, lm: dllm.LanguageModel, sampler: str, events: str | None
) -> None:
    own = {"sampler": sampler}
    body = {**COMMON, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**body, extra_body={"dllm": own}).choices[0]
    chunks = client.chat.completions.create(**body, stream=True, extra_body={"dllm": own | {"events": events}})
    text, found, having = "", [], 0
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        if choice.logprobs is None:
            assert not choice.delta.content
            continue
        having += 1
        found += choice.logprobs.content
        assert words(lm, [each.token for each in found]) == text
    assert text == whole.message.content
    assert found == whole.logprobs.content
    assert any(each.top_logprobs for each in found)
    assert having > 1


@pytest.mark.parametrize("top", [0, 3])
def test_chunks_of_a_completion_have_those_of_their_text_and_its_offsets(
    client: openai.OpenAI, lm: dllm.LanguageModel, top: int
) -> None:
    body = {**COMMON, "prompt": QUESTION, "logprobs": top, "n": 2, "temperature": 0.7}
    whole = client.completions.create(**body)
    texts, found = ["", ""], [dict[str, Any](), dict[str, Any]()]
    having = 0
    for chunk in client.completions.create(**body, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.logprobs is None:
            assert not choice.text
            continue
        having += 1
        so_far = found[choice.index]
        for name, values in choice.logprobs.model_dump().items():
            so_far[name] = values if values is None else so_far.get(name, []) + values
        assert words(lm, so_far["tokens"]) == texts[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert found == [choice.logprobs.model_dump() for choice in whole.choices]
    assert (found[0]["top_logprobs"] is None) == (top == 0)
    assert having > 2


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Tom has 23 apples. He", "suffix": " 12. How many apples does he have?", "max_tokens": 3},
        {"prompt": "Tom has <|mdm_mask|><|mdm_mask|> apples. He buys 12.", "dllm": {"infill": True}},
        {"prompt": [QUESTION, "Tom has 3 apples."], "max_tokens": 32},
        {"prompt": QUESTION, "max_tokens": 64, "stop": [" apples", "ow"]},
        {"prompt": QUESTION, "max_tokens": 1},
    ],
    ids=["suffix", "infill", "prompts", "stop", "one"],
)
def test_in_sum_they_are_those_of_the_whole_answer(server: Running, body: dict[str, Any]) -> None:
    body = {"logprobs": 1, "seed": 0} | body
    whole = server.post("completions", body).json()["choices"]
    found: list[dict[str, Any]] = [{} for _ in whole]
    for chunk in server.stream(**body):
        (choice,) = chunk["choices"]
        for name, values in (choice["logprobs"] or {}).items():
            found[choice["index"]].setdefault(name, []).extend(values)
    assert found == [choice["logprobs"] for choice in whole]


def test_a_stream_that_does_not_ask_for_them_has_none(server: Running) -> None:
    chunks = server.stream(prompt=QUESTION, max_tokens=32)
    assert all(choice["logprobs"] is None for chunk in chunks for choice in chunk["choices"])


def test_a_token_waits_for_all_of_its_text() -> None:
    tokenizer = text_model().tokenizer
    tokens = np.array(tokenizer("aé€b").input_ids)
    parts = [tokenizer.decode([token]) for token in tokens]
    assert "\ufffd" in "".join(parts)  # a character of several tokens
    final, known = FinalText(tokenizer, ["bc"], [tokenizer.eos_token_id]), 0
    for count in range(1, len(tokens) + 1):
        final.grow(tokens[:count])
        known = final.within(tokens[:count], known)
        assert tokenizer.decode(tokens[:known]) == final.told
    assert final.told == "aé€"  # b may begin a stop string
    final.finish("aé€b")
    assert final.within(tokens, known) == len(tokens)


@pytest.fixture(scope="module")
def writer() -> Iterator[Running]:
    """A server with a random model some of whose tokens are parts of characters."""
    pytest.importorskip("outlines_core")
    lm = text_model()
    lm.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with serving(lm, block_length=8) as running:
        yield running


def test_bytes_and_offsets_are_those_of_the_text(writer: Running) -> None:
    text = "😀é€ab12"
    body = {"max_tokens": 16, "response_format": {"type": "choice", "choice": [text]}}
    (choice,) = writer.post("completions", {"prompt": "ab", "logprobs": 3, **body}).json()["choices"]
    told = choice["logprobs"]
    assert choice["text"] == text
    assert told["text_offset"] == [0, 0, 0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7]
    assert told["tokens"][:5] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80", "é"]
    found: dict[str, list[Any]] = {}
    for chunk in writer.stream(prompt="ab", logprobs=3, **body):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            found.setdefault(name, []).extend(values)
    assert found == told
    messages = [{"role": "user", "content": "ab"}]
    (choice,) = writer.post("chat/completions", {"messages": messages, "logprobs": True, **body}).json()["choices"]
    written = b"".join(bytes(each["bytes"]) for each in choice["logprobs"]["content"])
    assert written == (text + "<|end|>").encode()


def test_offsets_count_no_special_tokens() -> None:
    pieces = Pieces(text_model().tokenizer)
    tokens = text_model().tokenizer("a<|other|>é<|end|>").input_ids  # two for é
    assert pieces.offsets(tokens) == [0, 1, 1, 1, 2]
    assert Pieces(None).offsets([5, 17, 3]) == [0, 2, 5]


@pytest.mark.parametrize(
    ("name", "base", "drafting"),
    [
        ("tiny-llada", "vanilla", "freedave"),
        ("tiny-llada", Threshold(0.9), FreeDave(6, Threshold(0.9), eager=True)),
        ("tiny-llada", "vanilla", FreeDave(4, "vanilla", draft_mode="tree")),
        ("tiny-llada", "vanilla", "ssd"),
        ("tiny-block", "vanilla", S2D2(8)),
    ],
    ids=["freedave", "eager", "tree", "ssd", "s2d2"],
)
def test_those_of_drafts_are_of_the_prediction_that_committed_them(name: str, base: Any, drafting: Any) -> None:
    own = dllm.load(name, device="cpu", dtype="float64")
    block = {} if name == "tiny-llada" else {"block_length": 1}
    found = []
    for sampler in (base, drafting):
        engine = dllm.Engine(own, sampler, "none", batch_size=2, max_length=96, **block)
        for question in (QUESTION, "Mia has 48 pens. She loses 4. How many pens does she have?"):
            engine.add(question, gen_length=24, seed=0, **({} if block else {"block_length": 8}))
        logprobs: dict[tuple[int, int], Any] = {}
        for step in engine.steps():
            for event in step:
                known = events.logprobs(event, int(step.padding[event.entry]), 1)
                logprobs |= {(event.id, place): (each.token, each.logprob) for place, each in known.items()}
        found.append(logprobs)
    assert found[0].keys() == found[1].keys()
    for place, (token, logprob) in found[0].items():
        assert found[1][place] == (token, pytest.approx(logprob, abs=1e-9))


def test_those_of_a_branch_are_its_own(lm: dllm.LanguageModel) -> None:
    predictions: list[Any] = []
    engine = dllm.Engine(lm, LoPA(2.0, branches=3, weight=0.0), "none", batch_size=1, max_length=96)
    denoise = type(engine.denoiser).__call__
    filled = 0

    def seen(self: Any, *given: Any, **more: Any) -> Any:
        predictions.append(denoise(self, *given, **more))
        return predictions[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.denoiser), "__call__", seen)
        engine.add(QUESTION, gen_length=32, seed=0)
        for step in engine.steps():
            prediction, (event,) = predictions[-1], step
            for place, each in events.logprobs(event, 0, 1).items():
                column = engine.denoiser.window.columns[0].tolist().index(place)
                shares = prediction.probability(torch.full(prediction.asked.shape, each.token)).log()[0, :, column]
                known = shares[prediction.asked[0, :, column]].tolist()
                assert each.logprob is None or each.logprob in known
                filled += len(known) < len(predictions[-1].asked[0])  # a branch has filled it
    assert filled
