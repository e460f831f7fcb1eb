"""Clients that others wrote, against the server: OpenAI's own, and lm-evaluation-harness."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import dllm

openai = pytest.importorskip("openai")
for needed in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(needed)

from serve_rig import QUESTION, Running, serving  # noqa: E402
from structure_rig import text_model  # noqa: E402

pytestmark = pytest.mark.xdist_group("serve")
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(api_key="secret", sampler="tiny/threshold", cache="dual") as running:
        yield running


@pytest.fixture(scope="module")
def expected() -> str:
    (text,) = dllm.generate(dllm.load("tiny-llada", device="cpu"), QUESTION, "tiny/threshold", "dual").texts
    assert text
    return text


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_chats_of_the_openai_client(client: openai.OpenAI, expected: str) -> None:
    answer = client.chat.completions.create(
        model="tiny-llada", messages=MESSAGES, temperature=0, max_tokens=128, logprobs=True, top_logprobs=1, n=2, seed=1
    )
    assert [choice.message.content for choice in answer.choices] == [expected, expected]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    content = answer.choices[0].logprobs.content
    assert "".join(each.token for each in content).startswith(expected)
    assert all(each.logprob <= 0 for each in content)


def test_streams_of_the_openai_client(client: openai.OpenAI, expected: str) -> None:
    stream = client.chat.completions.create(
        model="tiny-llada", messages=MESSAGES, stream=True, stream_options={"include_usage": True},
        extra_body={"dllm": {"events": "steps"}},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage.completion_tokens > 0
    assert any(chunk.dllm["committed"] for chunk in chunks if "committed" in (getattr(chunk, "dllm", None) or {}))


def test_completions_and_models_of_the_openai_client(client: openai.OpenAI, expected: str) -> None:
    answer = client.completions.create(model="tiny-llada", prompt=[QUESTION, QUESTION], max_tokens=128, logprobs=1)
    assert [choice.text for choice in answer.choices] == [expected, expected]
    filled = client.completions.create(model="tiny-llada", prompt="Tom has", suffix=" apples.", max_tokens=2)
    assert filled.usage.completion_tokens <= 2
    streamed = client.completions.create(model="tiny-llada", prompt=QUESTION, max_tokens=128, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected
    assert [model.id for model in client.models.list()] == ["tiny-llada"]
    assert client.models.retrieve("tiny-llada").id == "tiny-llada"


def test_errors_are_those_that_the_openai_client_knows(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature=-1"):
        client.chat.completions.create(model="tiny-llada", messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with other, pytest.raises(openai.AuthenticationError):
        other.models.list()


def test_many_at_once_from_the_asynchronous_client(server: Running, expected: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            asked = [client.completions.create(model="tiny-llada", prompt=QUESTION, max_tokens=128) for _ in range(12)]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [expected] * 12


TASK = """
task: served
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 64, temperature: 0.0, do_sample: false}}
filter_list: [{{name: last, filter: [{{function: regex, regex_pattern: "(\\\\d+)\\\\.$"}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.parametrize("kind", ["local-chat-completions", "local-completions"])
def test_lm_eval_scores_the_server(server: Running, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    for needed in ("aiohttp", "tenacity"):
        pytest.importorskip(needed)
    pytest.importorskip("lm_eval.models")  # registers them; after a plug-in of someone else nobody does
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"question": "Tom has 23 apples. He buys 12. How many apples does he have?", "answer": "35"}\n'
        '{"question": "Tom has 14 pens. He buys 11. How many pens does he have?", "answer": "25"}\n'
    )
    (tmp_path / "served.yaml").write_text(TASK.format(data=data))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    path = "chat/completions" if "chat" in kind else "completions"
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=f"model=tiny-llada,base_url={server.url}/v1/{path},num_concurrent=2,tokenizer_backend=None,"
        "tokenized_requests=False",
        tasks=["served"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template="chat" in kind,
        bootstrap_iters=0,
    )
    assert found["results"]["served"]["exact_match,last"] == 1.0


def test_the_openai_client_asks_for_a_format() -> None:
    pytest.importorskip("outlines_core")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema | {"additionalProperties": False}}}
    with serving(text_model(), max_length=128) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(
            model=running.service.terms.name, prompt="a", max_tokens=32, extra_body={"response_format": wanted}
        )
        assert set(json.loads(answer.choices[0].text)) == {"ok"}
        with pytest.raises(openai.BadRequestError, match="response_format"):
            client.completions.create(
                model=running.service.terms.name, prompt="a", extra_body={"response_format": {"type": "xml"}}
            )
