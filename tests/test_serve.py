"""The server: OpenAI's interface, streams, events of every step, limits and statistics."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import dllm
from commands import command
from toys import Leftmost

httpx = pytest.importorskip("httpx")
for needed in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(needed)

from dllm.decoding.ending import cut  # noqa: E402
from dllm.serving.loop import EngineLoop  # noqa: E402
from dllm.serving.protocol import Terms  # noqa: E402
from dllm.serving.ticket import FinalText  # noqa: E402
from serve_rig import QUESTION, Running, serving  # noqa: E402
from structure_rig import text_model  # noqa: E402

pytestmark = pytest.mark.xdist_group("serve")


@pytest.fixture(scope="module")
def lm() -> dllm.LanguageModel:
    return dllm.load("tiny-llada", device="cpu")


@pytest.fixture(scope="module")
def server(lm: dllm.LanguageModel) -> Iterator[Running]:
    with serving(lm, block_length=16) as running:
        yield running


def alone(lm: dllm.LanguageModel, prompt: Any = QUESTION, sampler: str = "vanilla", **options: Any) -> dllm.Generation:
    return dllm.generate(lm, prompt, sampler, **{"gen_length": 64, "block_length": 16, "seed": 0} | options)


def test_a_completion_is_that_of_generate_and_counts_its_text_only(server: Running, lm: dllm.LanguageModel) -> None:
    answer, own = server.complete(), alone(lm)
    (choice,) = answer["choices"]
    assert choice["text"] == own.texts[0] != ""
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": len(lm.tokenizer(QUESTION).input_ids),
        "completion_tokens": own.stats.tokens,
        "total_tokens": len(lm.tokenizer(QUESTION).input_ids) + own.stats.tokens,
    }
    assert answer["dllm"]["nfe"] == own.nfe.tolist()
    assert answer["object"] == "text_completion"


def test_a_chat_goes_through_the_template_and_continues_a_partial_answer(
    server: Running, lm: dllm.LanguageModel
) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    answer = server.post("chat/completions", {"messages": messages, "max_tokens": 64}).json()
    assert answer["choices"][0]["message"]["content"] == alone(lm, messages).texts[0]
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    again = server.post("chat/completions", {"messages": parts, "max_completion_tokens": 64}).json()
    assert again["choices"] == answer["choices"]


def test_what_is_streamed_is_the_text_and_only_grows(server: Running) -> None:
    whole = server.complete()["choices"][0]["text"]
    chunks = server.stream(prompt=QUESTION, max_tokens=64, stream_options={"include_usage": True})
    texts = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
    assert "".join(texts) == whole
    assert sum(map(bool, texts)) > 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]].count("stop") == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize(
    "sampler", ["vanilla", "tiny/wino", "tiny/t2m", "remdm", "tiny/edit", "freedave", "tiny/daedal"]
)
def test_no_text_is_sent_that_a_later_step_changes(server: Running, sampler: str) -> None:
    body = {"prompt": QUESTION, "max_tokens": 64, "dllm": {"sampler": sampler}, "seed": 0}
    chunks = server.stream(**body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == server.complete(**body)["choices"][0]["text"]
    assert "text" not in chunks[-1]["dllm"]


@pytest.mark.parametrize("sampler", ["vanilla", "tiny/wino", "tiny/threshold", "tiny/edit", "tiny/daedal"])
def test_the_events_of_all_steps_make_the_canvas(server: Running, lm: dllm.LanguageModel, sampler: str) -> None:
    body = {"prompt": QUESTION, "max_tokens": 64, "dllm": {"sampler": sampler, "events": "steps"}}
    steps = [chunk["dllm"] for chunk in server.stream(**body) if "dllm" in chunk]
    begin, *steps, end = steps
    assert begin == {"choice": 0, "begin": {"length": 64, "given": []}}
    canvas: dict[int, str] = {}
    for step in steps:
        canvas |= dict(step["committed"])
        for place in step["revoked"]:
            del canvas[place]
        open_places = {place for place, _, _ in step["provisional"]}
        assert not open_places & canvas.keys()
        assert all(share is None or 0 <= share <= 1 for _, _, share in step["provisional"])
    own = alone(lm, sampler=sampler, stop_at_eos=True)
    text = "".join(canvas[place] for place in sorted(canvas))
    assert text.startswith(own.texts[0])
    assert [step["nfe"] for step in steps] == sorted(step["nfe"] for step in steps)
    assert end["nfe"] == own.nfe.tolist()


def test_what_a_policy_takes_back_is_told(server: Running) -> None:
    chosen = {"sampler": "wino", "sampler_options": {"wide_in": 0.1}}
    chunks = server.stream(prompt=QUESTION, max_tokens=64, dllm=chosen | {"events": "steps"})
    assert any(chunk.get("dllm", {}).get("revoked") for chunk in chunks)


def test_infilling_tells_what_was_given_and_fills_the_masks(server: Running, lm: dllm.LanguageModel) -> None:
    text = f"Tom has {lm.tokenizer.mask_token * 2} apples. He buys 12."
    answer = server.post("completions", {"prompt": text, "dllm": {"infill": True}}).json()
    own = dllm.infill(lm, text, block_length=16, seed=0)
    assert answer["choices"][0]["text"] == own.texts[0]
    assert answer["usage"]["completion_tokens"] == 2
    begin = server.stream(prompt=text, dllm={"infill": True, "events": "steps"})[1]["dllm"]["begin"]
    assert begin["length"] == own.completions.shape[1]
    assert len(begin["given"]) == begin["length"] - 2


def test_a_suffix_gives_the_text_between(server: Running, lm: dllm.LanguageModel) -> None:
    answer = server.complete(prompt="Tom has 23 apples. He", suffix=" 12. How many apples does he have?", max_tokens=2)
    nothing = {"stop": [], "response_format": {"type": "text"}}
    assert (
        server.complete(
            prompt="Tom has 23 apples. He", suffix=" 12. How many apples does he have?", max_tokens=2, **nothing
        )["choices"]
        == answer["choices"]
    )
    tokenizer, mask = lm.tokenizer, lm.backbone.mask_token_id
    before, after = (
        tokenizer("Tom has 23 apples. He").input_ids,
        tokenizer(" 12. How many apples does he have?").input_ids,
    )
    own = dllm.infill(lm, [[*before, mask, mask, *after]], block_length=16, seed=0)
    middle = own.completions[0, len(before) : len(before) + 2]
    assert answer["choices"][0]["text"] == tokenizer.decode(middle, skip_special_tokens=True)
    streamed = server.stream(prompt="Tom has 23 apples. He", suffix=" 12. How many apples does he have?", max_tokens=2)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == answer["choices"][0]["text"]


def test_several_choices_have_their_own_seeds(server: Running, lm: dllm.LanguageModel) -> None:
    answer = server.complete(n=3, temperature=1.0, seed=7, max_tokens=32)
    own = alone(lm, [QUESTION] * 3, temperature=1.0, seed=7, gen_length=32)
    assert [choice["text"] for choice in answer["choices"]] == own.texts
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == len(lm.tokenizer(QUESTION).input_ids)
    chunks = server.stream(prompt=QUESTION, n=3, temperature=1.0, seed=7, max_tokens=32)
    for index in range(3):
        parts = [c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(parts) == own.texts[index]


def test_a_stop_string_ends_the_text_and_no_part_of_it_is_streamed(server: Running) -> None:
    whole = server.complete()["choices"][0]["text"]
    body = {"stop": [whole[10:16]], "max_tokens": 64}
    answer = server.complete(**body)
    assert answer["choices"][0]["text"] == whole[:10]
    assert answer["choices"][0]["finish_reason"] == "stop"
    chunks = server.stream(prompt=QUESTION, **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole[:10]


def test_a_text_that_fills_its_room_says_so(server: Running) -> None:
    assert server.complete(max_tokens=3)["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_are_those_of_the_commit(lm: dllm.LanguageModel) -> None:
    with serving(lm, block_length=16) as server:
        chat = {
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 16,
            "logprobs": True,
            "top_logprobs": 2,
        }
        answer = server.post("chat/completions", chat).json()
        content = answer["choices"][0]["logprobs"]["content"]
        assert len(content) == answer["usage"]["completion_tokens"]
        expected: dict[int, float] = {}
        start = len(lm.tokenizer(QUESTION).input_ids)
        with dllm.Engine(lm, batch_size=1) as engine:
            engine.add([{"role": "user", "content": QUESTION}], gen_length=16, block_length=16)
            for step in engine.steps():
                for place in step.change.committed[0].nonzero()[0]:
                    expected[int(place - step.padding[0]) - start] = math.log(step.confidence[0, place])
        for place, each in enumerate(content):
            assert each["logprob"] == pytest.approx(expected[place], abs=1e-6)
            assert each["top_logprobs"][0]["token"] == each["token"]
            assert each["top_logprobs"][0]["logprob"] >= each["top_logprobs"][1]["logprob"]
        completion = server.complete(logprobs=1, max_tokens=16)["choices"][0]["logprobs"]
        assert completion["token_logprobs"] == [each["logprob"] for each in content]
        assert "".join(completion["tokens"]) == "".join(each["token"] for each in content)


def test_a_token_that_was_not_predicted_where_it_is_has_no_log_probability(lm: dllm.LanguageModel) -> None:
    with serving(lm, samplers=["ar_guided"], block_length=16) as server:
        body = {"logprobs": 0, "dllm": {"sampler": "ar_guided"}}
        found = server.complete(**body)["choices"][0]["logprobs"]["token_logprobs"]
        assert all(each is None or each <= 0 for each in found)


def test_requests_may_choose_a_policy_and_its_numbers(server: Running, lm: dllm.LanguageModel) -> None:
    body = {"sampler": "threshold", "sampler_options": {"threshold": 0.5}}
    answer = server.complete(dllm=body)
    own = dllm.generate(lm, QUESTION, dllm.samplers.Threshold(0.5), gen_length=64, block_length=16)
    assert answer["choices"][0]["text"] == own.texts[0]
    assert answer["dllm"]["nfe"] == own.nfe.tolist()
    assert answer["dllm"]["sampler"] == "threshold"


def test_more_policies_than_engines_take_turns(lm: dllm.LanguageModel) -> None:
    names = ["threshold", "factor", "tiny/eb", "klass", "tiny/credit"]
    with serving(lm, engines=1) as server:
        found: dict[str, str] = {}

        def ask(name: str) -> None:
            found[name] = server.complete(dllm={"sampler": name}, max_tokens=32)["dllm"]["sampler"]

        threads = [threading.Thread(target=ask, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert found == dict(zip(names, names, strict=True))


def test_a_policy_gets_an_engine_while_others_never_rest() -> None:
    def made(choice: Any) -> Any:
        return SimpleNamespace(engine=SimpleNamespace(close=lambda: closed.append(choice)), tickets={}, used=0.0)

    def ticket(choice: Any) -> Any:
        return SimpleNamespace(job=SimpleNamespace(sampler=choice), done=False)

    closed: list[Any] = []
    loop = EngineLoop.__new__(EngineLoop)
    loop.__dict__.update(
        decoding=SimpleNamespace(engines=2, engine=lambda choice: choice),
        _rooms={None: made(None), "busy": made("busy")}, _changed=threading.Condition(), _gone=set(),
        _open=set(), _arrived=deque(),
    )  # fmt: skip
    for room in loop._rooms.values():
        room.tickets[0] = ticket("earlier")
        room.add = lambda each, room=room: room.tickets.update({len(room.tickets): each})
    waiting, behind, own = ticket("waiting"), ticket("busy"), ticket(None)
    loop._arrived.extend([waiting, behind, own])
    loop._take()
    assert list(loop._arrived) == [waiting, behind]  # what comes later for the other policy does not go first
    assert own in loop._rooms[None].tickets.values()  # the server's own policy goes on
    loop._rooms["busy"].tickets.clear()
    with patch("dllm.serving.loop._Room", lambda engine: SimpleNamespace(add=lambda each: None, tickets={0: waiting})):
        loop._take()
    assert closed == ["busy"]
    assert list(loop._rooms) == [None, "waiting"]
    assert list(loop._arrived) == [behind]


def test_models_tell_what_a_client_needs(server: Running) -> None:
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model == httpx.get(f"{server.url}/v1/models/tiny-llada").json()
    told = model["dllm"]
    assert told["mask_token"] == "<|mdm_mask|>"
    kinds = {each["name"]: each["kind"] for each in told["samplers"]}
    assert kinds["wino"] == "revising"
    assert "ar_guided" not in kinds
    options = {each["name"]: each["options"] for each in told["samplers"]}
    assert options["threshold"] == {"threshold": 0.9, "at_least": 1}
    assert httpx.get(f"{server.url}/v1/models/other").status_code == 404


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"foo": 1}, "foo", "unknown field 'foo'"),
    ({"dllm": {"foo": 1}}, "dllm.foo", "unknown field 'dllm.foo'"),
    ({"temperature": "hot"}, "temperature", "temperature='hot' is not valid; give a number"),
    ({"temperature": -1}, "temperature", "temperature=-1.0 is out of range"),
    ({"temperature": True}, "temperature", "temperature=True is not valid"),
    ({"top_p": 7}, "top_p", "top_p=7.0 is out of range"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0 is out of range"),
    ({"max_tokens": 5000}, "max_tokens", "max_tokens=5000 does not fit"),
    ({"max_tokens": "12"}, "max_tokens", "max_tokens='12' is not valid"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens=1.5 is not valid"),
    ({"prompt": 5}, "prompt", "prompt=5 is not valid"),
    ({"prompt": []}, "prompt", "prompt=[] is empty"),
    ({"prompt": ["a"] * 17}, "prompt", "prompt has 17 entries"),
    ({"prompt": [1, 10**9]}, "prompt", "prompt has token id 1000000000"),
    ({"prompt": "a<|mdm_mask|>"}, "prompt", "prompt contains [MASK]"),
    ({"n": 0}, "n", "n=0 is out of range; use 1 to 16"),
    ({"n": 17}, "n", "n=17 is out of range"),
    ({"seed": -1}, "seed", "seed=-1 is out of range"),
    ({"seed": 2**63}, "seed", "seed=9223372036854775808 is out of range"),
    ({"stop": ""}, "stop", "stop='' contains an empty string"),
    ({"stop": [1]}, "stop", "stop=[1] is not valid"),
    ({"logprobs": 21}, "logprobs", "logprobs=21 is not valid"),
    ({"logit_bias": {"1": 3}}, "logit_bias", "logit_bias={'1': 3} is not supported; leave it out"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty=0.5 is not supported"),
    ({"echo": True}, "echo", "echo=True is not supported"),
    ({"tools": [{}]}, "tools", "tools=[{}] is not supported"),
    ({"model": "gpt"}, "model", "model='gpt' is not served here; use 'tiny-llada'"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream=true"),
    ({"dllm": {"events": "steps"}}, "dllm.events", "dllm.events needs stream=true"),
    ({"dllm": {"events": "all"}, "stream": True}, "dllm.events", "dllm.events='all' is not valid; give 'steps'"),
    ({"dllm": {"block_length": 0}}, "dllm.block_length", "dllm.block_length=0 is out of range"),
    ({"dllm": {"top_k": 0}}, "dllm.top_k", "dllm.top_k=0 is out of range"),
    ({"dllm": {"eos_suppression": "x"}}, "dllm.eos_suppression", "unknown dllm.eos_suppression='x'"),
    ({"dllm": {"max_forwards": 2}}, "dllm.max_forwards", "dllm.max_forwards=2 is reached"),
    ({"dllm": {"max_forwards": 0}}, "dllm.max_forwards", "dllm.max_forwards=0 is out of range"),
    ({"dllm": {"sampler": "nope"}}, "dllm.sampler", "unknown dllm.sampler='nope'; expected one of adablock"),
    ({"dllm": {"sampler": "ar_guided"}}, "dllm.sampler", "unknown dllm.sampler='ar_guided'"),
    (
        {"dllm": {"sampler_options": {"threshold": 1}}},
        "dllm.sampler_options",
        "dllm.sampler_options needs dllm.sampler",
    ),
    ({"dllm": {"sampler": "threshold", "sampler_options": {"file": 1}}}, "dllm.sampler_options.file", "unknown option"),
    (
        {"dllm": {"sampler": "learn2pd", "sampler_options": {"filter": "/etc/passwd"}}},
        "dllm.sampler_options.filter",
        "dllm.sampler_options.filter='/etc/passwd' is not valid",
    ),
    (
        {"dllm": {"sampler": "threshold", "sampler_options": {"threshold": -3}}},
        "dllm.sampler_options.threshold",
        "dllm.sampler_options.threshold=-3 is out of range",
    ),
    ({"dllm": {"infill": True}, "max_tokens": None}, "prompt", "prompt has no [MASK]"),
    ({"dllm": {"infill": True}}, "max_tokens", "max_tokens has no effect on infilling"),
    ({"suffix": "a", "stop": "b"}, "stop", "stop has no effect on infilling"),
    ({"suffix": "a", "dllm": {"infill": True}}, "suffix", "suffix and dllm.infill exclude each other"),
    ({"suffix": "a", "max_tokens": 600}, "max_tokens", "max_tokens=600 does not fit"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD, ids=[each[2] for each in BAD])
def test_bad_requests_are_refused_in_one_line_that_names_the_field(
    server: Running, body: dict[str, Any], param: str, message: str
) -> None:
    error = server.refused(**body)
    assert error["message"].startswith(message)
    assert "\n" not in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"a"', b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}', b"null"]
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_bodies_that_are_no_requests_are_refused(server: Running, body: bytes, path: str) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400
    assert "\n" not in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [[], [{}], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "hi"],
)
def test_messages_that_are_no_chat_are_refused(server: Running, messages: Any) -> None:
    assert server.post("chat/completions", {"messages": messages}).status_code == 400


def test_fields_without_effect_are_accepted(server: Running) -> None:
    neutral = {"user": "me", "frequency_penalty": 0, "logit_bias": {}, "best_of": 1, "echo": False, "stop": None}
    assert server.complete(**neutral)["choices"] == server.complete()["choices"]


def test_other_paths_and_methods_are_errors_of_the_same_form(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


def test_a_full_queue_answers_429_with_a_time(lm: dllm.LanguageModel) -> None:
    with serving(lm, batch_size=1, queue=2) as server:
        found: list[httpx.Response] = []
        body = {"prompt": QUESTION, "max_tokens": 120, "dllm": {"stop_at_eos": False}}

        def ask() -> None:
            found.append(server.post("completions", body))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        longest = 0.0
        while any(thread.is_alive() for thread in threads):
            longest = max(longest, server.metrics()["dllm_queue_length"])
        assert 0 < longest <= 3  # one is in the queue until its first step
        codes = sorted(each.status_code for each in found)
        assert codes[:1] == [200]
        assert codes[-1:] == [429]
        assert codes.count(200) >= 3
        refused = next(each for each in found if each.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        counted = server.metrics()
        assert counted['dllm_requests_total{outcome="refused"}'] == codes.count(429)
        assert counted['dllm_requests_total{outcome="finished"}'] == codes.count(200)
        assert counted["dllm_queue_length"] == 0


def test_a_client_that_goes_away_frees_its_slot(lm: dllm.LanguageModel) -> None:
    body = {"prompt": QUESTION, "max_tokens": 400, "dllm": {"stop_at_eos": False, "block_length": 400}}
    with serving(lm, batch_size=1) as server:
        for stream in (True, False):
            raw = json.dumps(body | {"stream": stream}).encode()
            with socket.create_connection(("127.0.0.1", server.server._listener.getsockname()[1])) as client:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
                client.sendall(head.encode() + raw)
                deadline = time.monotonic() + 30
                while not server.metrics()["dllm_slots_busy"] and time.monotonic() < deadline:
                    time.sleep(0.01)
            answer = server.complete(max_tokens=8)
            assert answer["dllm"]["seconds"] < 5
        deadline = time.monotonic() + 30
        while len(server.log.lines) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [line["outcome"] for line in server.log.lines].count("cancelled") == 2
        assert server.metrics()['dllm_requests_total{outcome="cancelled"}'] == 2
        assert server.metrics()["dllm_slots_busy"] == 0


def test_formats_that_take_long_keep_nobody_else_waiting(
    lm: dllm.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, plan = threading.Event(), Terms.plan

    def slow(terms: Terms, request: Any) -> Any:
        if request.response_format is not None:
            compiled.wait(60)
        return plan(terms, request)

    monkeypatch.setattr(Terms, "plan", slow)
    body = {"prompt": QUESTION, "max_tokens": 8}
    formatted = body | {"response_format": {"type": "regex", "regex": "[0-9]+"}}
    with serving(lm, timeout=2) as server, ThreadPoolExecutor(45) as clients:
        answers = [clients.submit(server.post, "completions", formatted) for _ in range(45)]
        time.sleep(0.2)
        try:
            assert server.post("completions", body).status_code == 200
            assert {each.result().status_code for each in answers} == {504}
        finally:
            compiled.set()
        assert server.metrics()["dllm_queue_length"] == 0
        monkeypatch.undo()
        assert server.post("completions", formatted).status_code == 200


def test_formats_of_clients_that_go_away_are_not_compiled(
    lm: dllm.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, plan, begun = threading.Event(), Terms.plan, list[str]()

    def slow(terms: Terms, request: Any) -> Any:
        begun.append(request.prompt)
        compiled.wait(60)
        return plan(terms, request)

    monkeypatch.setattr(Terms, "plan", slow)
    form = {"type": "choice", "choice": ["8", "12"]}
    with serving(lm, batch_size=1, queue=1) as server, ThreadPoolExecutor(2) as clients:

        def wait_for(count: int) -> None:
            deadline = time.monotonic() + 30
            while len(server.service.planned) != count and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(server.service.planned) == count

        def ask(prompt: str) -> httpx.Response:
            return server.post("completions", {"prompt": prompt, "max_tokens": 8, "response_format": form})

        answers = [clients.submit(ask, "first")]
        try:
            wait_for(1)
            for _ in range(3):
                raw = json.dumps({"prompt": "gone", "response_format": form}).encode()
                with socket.create_connection(("127.0.0.1", server.server._listener.getsockname()[1])) as client:
                    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
                    client.sendall(head.encode() + raw)
                    wait_for(2)
                wait_for(1)
            answers.append(clients.submit(ask, "last"))
            wait_for(2)
            assert ask("too many").status_code == 429
        finally:
            compiled.set()
        assert {each.result().status_code for each in answers} == {200}
        assert begun == ["first", "last"]
        assert [line["status"] for line in server.log.lines].count(499) == 3


def test_a_request_that_takes_too_long_ends(lm: dllm.LanguageModel) -> None:
    body = {"prompt": QUESTION, "max_tokens": 450, "dllm": {"stop_at_eos": False, "block_length": 450}}
    with serving(lm, timeout=0.3) as server:
        answer = server.post("completions", body)
        assert answer.status_code == 504
        assert "0.3 seconds" in answer.json()["error"]["message"]
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert "0.3 seconds" in json.loads(lines[-1][6:])["error"]["message"]
        assert server.metrics()['dllm_requests_total{outcome="timeout"}'] == 2


def test_bodies_over_the_limit_and_slow_ones_are_refused(lm: dllm.LanguageModel) -> None:
    with serving(lm, max_body=1000, io_timeout=0.3) as server:
        assert server.post("completions", {"prompt": "x" * 2000}).status_code == 413

        def endless() -> Iterator[bytes]:
            for _ in range(100):
                yield b"x" * 100

        answer = httpx.post(f"{server.url}/v1/completions", content=endless())
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["error"]["message"]
        with socket.create_connection(("127.0.0.1", server.server._listener.getsockname()[1])) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in client.recv(1000)
        for sent in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: "):  # headers that do not come
            with socket.create_connection(("127.0.0.1", server.server._listener.getsockname()[1]), timeout=5) as client:
                client.sendall(sent)
                assert client.recv(1000) == b""
        with httpx.Client() as client:  # an idle connection is no late one
            for _ in range(2):
                assert client.get(f"{server.url}/health").status_code == 200
                time.sleep(0.5)
            assert client.get(f"{server.url}/health").status_code == 200
        told = [(line["status"], line["outcome"], line["path"]) for line in server.log.lines]
        assert told == [(status, "refused", "/v1/completions") for status in (413, 413, 408)]


def test_a_key_is_asked_for_where_there_is_one(lm: dllm.LanguageModel) -> None:
    with serving(lm, api_key="secret") as server:
        assert server.post("completions", {"prompt": "a"}).status_code == 401
        assert server.post("completions", {"prompt": "a"}, headers={"Authorization": "Bearer wrong"}).status_code == 401
        answer = server.post(
            "completions", {"prompt": "a", "max_tokens": 4}, headers={"Authorization": "Bearer secret"}
        )
        assert answer.status_code == 200
        assert httpx.get(f"{server.url}/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert [line["status"] for line in server.log.lines] == [401, 401, 200, 401]


def test_requests_join_at_any_step_and_none_sees_another(lm: dllm.LanguageModel) -> None:
    prompts = [f"Tom has {n} apples. He buys {n + 3}. How many apples does he have?" for n in range(20, 44)]
    expected = alone(lm, prompts, batch_size=4).texts
    with serving(lm, batch_size=4, block_length=16) as server:
        found: dict[int, str] = {}

        def ask(number: int) -> None:
            time.sleep(0.01 * number)
            body = {"prompt": prompts[number], "max_tokens": 64}
            if number % 2:
                found[number] = "".join(chunk["choices"][0]["text"] for chunk in server.stream(**body))
            else:
                found[number] = server.complete(**body)["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert [found[number] for number in range(len(prompts))] == expected


def test_metrics_count_what_was_done(lm: dllm.LanguageModel) -> None:
    with serving(lm) as server:
        answer = server.complete()
        server.stream(prompt=QUESTION, max_tokens=64)
        counted = server.metrics()
        assert counted["dllm_tokens_total"] == 2 * answer["usage"]["completion_tokens"]
        assert counted["dllm_forwards_total"] == 2 * answer["dllm"]["nfe"][0]
        assert counted["dllm_time_to_first_text_seconds_count"] == 1
        assert counted["dllm_time_to_first_commit_seconds_count"] == 2
        assert counted["dllm_request_seconds_count"] == 2
        assert counted["dllm_slots"] == 8
        assert 0 < counted["dllm_busy_slot_steps_total"] < counted["dllm_slot_steps_total"]


def test_the_error_of_the_cache_is_told(lm: dllm.LanguageModel) -> None:
    cache = dllm.cache.Dual(measure_every=2)
    with serving(lm, cache="dual") as server:
        assert server.metrics()["dllm_cache_error"] == 0
    with serving(lm, cache=cache) as server:
        server.complete()
        assert server.metrics()["dllm_cache_error"] > 0


def test_the_first_step_is_no_waiting(server: Running) -> None:
    before = len(server.log.lines)
    asked = {"prompt": f"{QUESTION}<|mdm_mask|>", "dllm": {"infill": True}}
    told = server.post("completions", asked).json()["dllm"]
    assert told["nfe"] == [1]
    assert 0 <= told["queued_seconds"] < told["seconds"]
    line = next(line for line in server.log.lines[before:] if "queued_seconds" in line)
    assert line["queued_seconds"] == told["queued_seconds"]


def test_an_answer_without_text_has_no_first_text(server: Running) -> None:
    told = server.post("completions", {"prompt": QUESTION, "max_tokens": 8, "stop": "e"}).json()
    assert told["dllm"]["seconds_to_first_text"] is not None
    first = told["choices"][0]["text"][0]
    told = server.post("completions", {"prompt": QUESTION, "max_tokens": 8, "stop": first}).json()
    assert told["choices"][0]["text"] == ""
    assert told["dllm"]["seconds_to_first_text"] is None


def test_the_log_has_no_text_unless_it_is_asked_for(lm: dllm.LanguageModel) -> None:
    for wanted in (False, True):
        with serving(lm, log_prompts=wanted) as server:
            text = server.complete()["choices"][0]["text"]
            server.refused(temperature=-1)
            lines = json.dumps(server.log.lines)
            assert (QUESTION in lines) == (text in lines) == wanted
            finished, refused = server.log.lines
            assert (finished["status"], finished["outcome"], finished["tokens"]) == (200, "finished", 18)
            assert (refused["status"], refused["outcome"]) == (400, "refused")


def test_what_one_client_asked_to_be_told_does_not_end_the_others(
    lm: dllm.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lm) as server:
        monkeypatch.setattr("dllm.serving.ticket.logprobs", lambda *_: {}["nothing"])
        answer = server.post("completions", {"prompt": QUESTION, "max_tokens": 8, "logprobs": 1})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert server.complete(max_tokens=8)["choices"][0]["finish_reason"] == "length"
        assert server.metrics()['dllm_requests_total{outcome="failed"}'] == 1


def test_a_bug_is_logged_and_answered(lm: dllm.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lm) as server:
        monkeypatch.setattr(type(server.service.terms), "plan", lambda *_: {}["nothing"])
        answer = server.post("completions", {"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        (line,) = server.log.lines
        assert "KeyError" in line["error"]
        assert "nothing" not in line["error"].partition("\n")[0]


def test_a_client_that_never_reads_is_let_go(lm: dllm.LanguageModel) -> None:
    body = {
        "prompt": QUESTION,
        "max_tokens": 400,
        "n": 8,
        "stream": True,
        "dllm": {"stop_at_eos": False, "events": "steps"},
    }
    raw = json.dumps(body | {"temperature": 1.0}).encode()
    with serving(lm, io_timeout=0.5, sampler="tiny/eb") as server, socket.socket() as client:
        for side, buffer in ((client, socket.SO_RCVBUF), (server.server._listener, socket.SO_SNDBUF)):
            side.setsockopt(socket.SOL_SOCKET, buffer, 4096)
        client.connect(("127.0.0.1", server.server._listener.getsockname()[1]))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        client.sendall(head.encode() + raw)
        deadline = time.monotonic() + 60
        while not server.log.lines and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.log.lines[0]["outcome"] == "cancelled", server.log.lines
        assert server.complete()["choices"][0]["text"]


def test_an_engine_that_breaks_fails_its_requests_and_is_replaced(lm: dllm.LanguageModel) -> None:
    class Breaking(Leftmost):
        broken = 0

        def step(self, window: Any, denoise: Any, state: Any) -> Any:
            if Breaking.broken:
                Breaking.broken -= 1
                raise RuntimeError("it broke")
            return super().step(window, denoise, state)

    with serving(lm, sampler=Breaking()) as server:
        text = server.complete(max_tokens=8)["choices"][0]["text"]
        Breaking.broken = 1
        answer = server.post("completions", {"prompt": QUESTION, "max_tokens": 8})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "it broke" in answer.json()["error"]["message"]
        assert server.complete(max_tokens=8)["choices"][0]["text"] == text
        assert httpx.get(f"{server.url}/health").status_code == 200
        Breaking.broken = 3
        for _ in range(3):
            server.post("completions", {"prompt": QUESTION, "max_tokens": 8})
        assert httpx.get(f"{server.url}/health").status_code == 503


def test_a_policy_that_a_client_chose_makes_no_server_unhealthy(
    lm: dllm.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(dllm.samplers.LocalLeap, "step", breaks)
    with serving(lm) as server:
        for _ in range(4):
            asked = {"prompt": QUESTION, "max_tokens": 8, "dllm": {"sampler": "localleap"}}
            assert server.post("completions", asked).status_code == 500
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_what_runs_is_finished_when_the_server_stops_and_nothing_new_begins(lm: dllm.LanguageModel) -> None:
    body = {"prompt": QUESTION, "max_tokens": 100, "dllm": {"stop_at_eos": False}, "stream": True}
    with serving(lm, batch_size=1) as server, httpx.Client() as other:
        assert other.get(f"{server.url}/ready").status_code == 200
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.server.stop()
            assert other.get(f"{server.url}/ready").status_code == 503
            refused = other.post(f"{server.url}/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"


def test_what_does_not_finish_in_time_is_handed_back_with_an_error(lm: dllm.LanguageModel) -> None:
    body = {"prompt": QUESTION, "max_tokens": 450, "dllm": {"stop_at_eos": False, "block_length": 450}}
    with serving(lm, batch_size=1, drain=0.2) as server:
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(server.post("completions", body)))
        thread.start()
        while not server.metrics()["dllm_slots_busy"]:
            time.sleep(0.01)
        server.server.stop()
        thread.join(60)
        assert (found[0].status_code, found[0].json()["error"]["type"]) == (503, "server_error")


def test_a_server_over_a_block_causal_model_with_its_cache() -> None:
    lm = dllm.load("tiny-block", device="cpu")
    with serving(lm, cache="block") as server:
        assert server.complete()["choices"][0]["text"] == dllm.generate(lm, QUESTION, gen_length=64).texts[0]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("port=70000", "port=70000 is out of range; use a whole number from 0 to 65535"),
        ("queue=-1", "queue=-1 is out of range"),
        ("engines=0", "engines=0 is out of range"),
        ("timeout=0", "timeout=0 is out of range"),
        ("host=not.a.host.invalid", "host='not.a.host.invalid', port=0 cannot be used"),
        ("api_key=", "api_key='' is not valid"),
        ("gen_length=0", "gen_length=0 is out of range"),
        ("samplers=[nope]", "unknown samplers='nope'"),
        ("max_length=100000", "max_length=100000 is out of range"),
        ("batch_size=0", "batch_size=0 is out of range"),
        ("nothing=1", "nothing"),
    ],
)
def test_bad_options_of_the_command_end_it_in_one_line(option: str, said: str) -> None:
    outcome = command("serve", "port=0", option)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.startswith("dllm serve: error: ")
    assert outcome.err.count("\n") == 1


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = command("serve", f"port={port}")
    assert outcome.code == 2
    assert f"port={port} cannot be used" in outcome.err


def test_the_confidence_of_committed_tokens_is_told(server: Running) -> None:
    body = {"prompt": QUESTION, "max_tokens": 64, "dllm": {"sampler": "threshold", "events": "steps"}}
    steps = [chunk["dllm"] for chunk in server.stream(**body) if "committed" in chunk.get("dllm", {})]
    together = [step["confidence"] for step in steps if len(step["committed"]) > 1]
    assert together and all(share is not None and 0.9 < share <= 1 for shares in together for share in shares)
    assert all(len(step["confidence"]) == len(step["committed"]) for step in steps)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "apples": {"type": "integer"}},
    "required": ["name", "apples"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def writer() -> Iterator[Running]:
    """A server with a random model that can write any text."""
    pytest.importorskip("outlines_core")
    with serving(text_model(), max_length=256, gen_length=64) as running:
        yield running


@pytest.mark.parametrize("scaffold", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_answers_follow_the_format_that_is_asked_for(writer: Running, scaffold: bool, stream: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    wanted: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "apples", "schema": SCHEMA}}
    body = {"prompt": "a", "max_tokens": 64, "response_format": wanted | {"scaffold": True} if scaffold else wanted}
    if stream:
        chunks = writer.stream(**body, dllm={"sampler": "threshold", "events": "steps"})
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        begin = chunks[1]["dllm"]["begin"]
        assert bool(begin["given"]) == scaffold
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        answer = writer.complete(**body, dllm={"sampler": "threshold"})
        text = answer["choices"][0]["text"]
        assert 0 < answer["usage"]["completion_tokens"] <= 64
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("json", "response_format='json' is not valid"),
        ("/etc/passwd", "response_format='/etc/passwd' is not valid"),
        ({"type": "xml"}, "unknown response_format.type='xml'"),
        ({"type": "regex", "regex": "("}, "response_format of type regex cannot be compiled"),
        ({"type": "regex", "regex": "[0-9]{200}"}, "response_format needs at least"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "response_format"),
    ],
)
def test_formats_that_cannot_be_followed_are_refused(writer: Running, wanted: Any, message: str) -> None:
    error = writer.refused(response_format=wanted)
    assert error["message"].startswith(message)
    assert error["param"].startswith("response_format")


@pytest.mark.parametrize(
    ("option", "lengths", "message"),
    [
        ({"max_tokens": 4}, {"value_length": 6}, "max_tokens has no effect beside response_format.value_length"),
        ({"max_tokens": None}, {"value_length": 10**6}, "response_format.scaffold has"),
        ({"dllm": {"stop_at_eos": False}}, {}, "dllm.stop_at_eos has no effect with response_format.scaffold"),
    ],
)
def test_what_does_not_suit_a_scaffold_is_refused(
    writer: Running, option: dict[str, Any], lengths: dict[str, int], message: str
) -> None:
    form = {"type": "json_schema", "schema": SCHEMA, "scaffold": True, **lengths}
    assert writer.refused(response_format=form, **option)["message"].startswith(message)


@pytest.mark.parametrize(
    "given",
    [
        {"type": "regex", "regex": "(a|b)*a(a|b){30}"},
        {"type": "grammar", "grammar": "start: " + ' ("a"|"b")' * 24},
    ],
)
def test_a_format_that_would_take_the_server_down_is_refused(
    given: dict[str, Any], writer: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm.structure.compiled.SECONDS", 1)
    error = writer.refused(response_format=given)
    assert error["message"].startswith(f"response_format of type {given['type']} takes too long or too much memory")


def test_a_stop_string_across_a_special_token_is_not_streamed_in_part() -> None:
    words = text_model().tokenizer
    other = words.convert_tokens_to_ids("<|other|>")
    tokens = np.array([*words("a").input_ids, other, *words("xyz").input_ids])
    stops = ["<|other|>xy"]
    final = FinalText(words, stops, [words.eos_token_id])
    told = "".join(final.grow(tokens[:count]) for count in range(1, len(tokens) + 1))
    assert told == "a" == cut(words, tokens, stops)[0]
    assert final.finish("a") == ""
    assert final.kept


@pytest.mark.parametrize("stop", [">>>", "|> ", "<|end|>x", "d|>>", "r|>b"])
@pytest.mark.parametrize("text", ["a<|other|>b<|end|>c", "a>b>", "a<|end|><|other|>", "<|other|><|end|>b>"])
def test_no_part_of_a_special_token_is_streamed(text: str, stop: str) -> None:
    words = text_model().tokenizer
    tokens = np.array(words(text).input_ids)
    final, (whole, _) = FinalText(words, [stop], [words.eos_token_id]), cut(words, tokens, [stop], [words.eos_token_id])
    told = "".join(final.grow(tokens[:count]) for count in range(1, len(tokens) + 1))
    assert told + final.finish(whole or "") == whole
    assert final.kept
