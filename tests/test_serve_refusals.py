"""Requests and surroundings that a server must survive: hostile numbers, a lost log, timeouts, odd keys."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import dllm
from dllm.decoding.engine import Engine
from dllm.samplers import Vanilla
from toys import Leftmost

httpx = pytest.importorskip("httpx")
for needed in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(needed)

from serve_rig import QUESTION, serving  # noqa: E402

pytestmark = pytest.mark.xdist_group("serve")


@pytest.fixture(scope="module")
def lm() -> dllm.LanguageModel:
    return dllm.load("tiny-llada", device="cpu")


@pytest.mark.parametrize("value", [10**30, 2**64, 2**63 - 1, -(2**63), -(10**30)])
def test_a_number_that_no_tensor_holds_breaks_no_engine(lm: dllm.LanguageModel, value: int) -> None:
    with serving(lm, block_length=16) as server:
        chosen = {"sampler": "threshold", "sampler_options": {"threshold": value}}
        answer = server.post("completions", {"prompt": "a", "max_tokens": 4, "dllm": chosen})
        assert answer.status_code in (200, 400), answer.text
        assert server.metrics()['dllm_requests_total{outcome="failed"}'] == 0


@pytest.mark.parametrize("place", ["__init__", "submit"])
def test_a_request_that_no_engine_can_take_ends_no_other(
    lm: dllm.LanguageModel, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with serving(lm) as server:
        inner = getattr(Engine, place)

        def broken(engine: Engine, *arguments: Any, **options: Any) -> Any:
            inner(engine, *arguments, **options)
            raise TypeError("it broke")

        with monkeypatch.context() as patched:
            patched.setattr(Engine, place, broken)
            answer = server.post(
                "completions", {"prompt": "a", "max_tokens": 4, "dllm": {"sampler": "localleap", "sampler_options": {}}}
            )
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "it broke" in answer.json()["error"]["message"]
        assert server.complete(max_tokens=4)["choices"][0]["text"]


def test_of_several_prompts_the_one_that_is_refused_is_told(lm: dllm.LanguageModel) -> None:
    with serving(lm, Vanilla(steps=8), max_length=64, gen_length=32) as server:
        for prompts in ([[5] * 3, [5] * 61], [[5] * 61, [5] * 3]):
            answer = server.post("completions", {"prompt": prompts})
            assert answer.status_code == 400
            assert "steps=8 is out of range" in answer.json()["error"]["message"]


def test_options_that_only_equal_a_choice_are_refused(lm: dllm.LanguageModel) -> None:
    with serving(lm) as server:
        chosen = {"sampler": "freedave", "sampler_options": {"eager": 1.0}}
        assert "eager=1.0" in server.refused(prompt="a", dllm=chosen)["message"]


def test_options_without_effect_are_refused(lm: dllm.LanguageModel) -> None:
    with serving(lm) as server:
        chat = {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}
        for more in ({}, {"logprobs": False}):
            answer = server.post("chat/completions", chat | more)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "top_logprobs"


def test_texts_beyond_a_row_are_refused_with_the_row(lm: dllm.LanguageModel) -> None:
    mask, long = lm.backbone.mask_token_id, [5] * 64
    with serving(lm, max_length=64, gen_length=32) as server:
        for text, param, body in (
            ("prompt has 64 tokens, and a row of the server 64, which leaves no room", "prompt", {"prompt": long}),
            ("prompt has 600 tokens", "prompt", {"prompt": [5] * 600, "max_tokens": 8}),
            ("prompt and suffix have 65 tokens", "prompt", {"prompt": long, "suffix": "a"}),
            ("prompt has 65 tokens", "prompt", {"prompt": [*long, mask], "dllm": {"infill": True}}),
        ):
            answer = server.post("completions", body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["message"].startswith(text)) == (400, param, True), error
        answer = server.post("chat/completions", {"messages": [{"role": "user", "content": "Tom has apples. " * 40}]})
        assert "messages have " in answer.json()["error"]["message"]
        assert server.post("completions", {"prompt": [5] * 63}).json()["usage"]["completion_tokens"] == 1


def test_masks_beside_a_suffix_are_refused(lm: dllm.LanguageModel) -> None:
    assert lm.tokenizer is not None
    mask = lm.tokenizer.mask_token
    with serving(lm) as server:
        for name in ("prompt", "suffix"):
            texts = {"prompt": "Tom", "suffix": "apples"} | {name: f"Tom {mask}"}
            assert server.refused(**texts)["param"] == name


def test_a_bad_prompt_is_named_as_the_client_calls_it(lm: dllm.LanguageModel) -> None:
    with serving(lm) as server:
        for chat in ([{"role": "user"}], [{"role": "assistant", "content": ""}]):
            error = server.post("chat/completions", {"messages": chat}).json()["error"]
            assert (error["param"], error["message"][:8]) == ("messages", "messages"), error
        error = server.refused(max_tokens=0)
        assert (error["param"], error["message"][-20:]) == ("max_tokens", "number of at least 1"), error
        error = server.refused(prompt=[[5, 6], "Tom"])
        assert (error["param"], error["message"][:6]) == ("prompt", "prompt"), error


def test_more_answers_than_the_server_can_ever_hold_are_a_bad_request(lm: dllm.LanguageModel) -> None:
    with serving(lm, batch_size=2, queue=1) as server:
        assert "room for 3" in server.refused(prompt=QUESTION, n=4)["message"]
        assert len(server.complete(n=3, max_tokens=4)["choices"]) == 3


def test_a_log_that_cannot_be_written_costs_no_answer(lm: dllm.LanguageModel) -> None:
    class Lost:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    with serving(lm) as server:
        server.service.log._stream = Lost()
        assert server.complete()["choices"][0]["text"]
        assert server.refused(n=0)["param"] == "n"


def test_a_timeout_is_told_even_if_the_engine_drops_the_request_at_once(lm: dllm.LanguageModel) -> None:
    class Waits(Leftmost):
        free = threading.Event()

        def step(self, window: Any, denoise: Any, state: Any) -> Any:
            loops[0]._gone = Watched()
            Waits.free.wait(20)
            return super().step(window, denoise, state)

    class Watched(set[Any]):
        """What the engine's thread reads as soon as it is there."""

        def add(self, ticket: Any) -> None:
            failures.append(ticket.failure)
            super().add(ticket)

    failures: list[Any] = []
    loops: list[Any] = []
    with serving(lm, sampler=Waits(), timeout=0.2) as server:
        loops.append(server.service.loop)
        threading.Timer(2, Waits.free.set).start()
        assert server.post("completions", {"prompt": "a", "max_tokens": 4}).status_code == 504
        assert [failure and failure.status for failure in failures][:1] == [504]


@pytest.mark.parametrize("key", ["secret\n", " secret"])
def test_space_around_the_key_does_not_lock_everyone_out(
    lm: dllm.LanguageModel, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("DLLM_API_KEY", key)
    with serving(lm) as server:
        found = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer secret"})
        assert found.status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401


@pytest.mark.parametrize("key", ["  ", "schlüssel", "a\nb"])
def test_a_key_that_no_header_can_hold_is_refused(
    lm: dllm.LanguageModel, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("DLLM_API_KEY", key)
    with pytest.raises(ValueError, match="DLLM_API_KEY"), serving(lm):
        pass
