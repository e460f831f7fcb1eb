"""A guide's cache: whatever is rejected, replaced or finished, its answers are those of reading everything anew."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPTNeoConfig, GPTNeoForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dllm.decoding.graphs import Replays
from dllm.guide import Guide, Judging, load_guide
from models import random_guide
from toys import Device

VOCAB = 64


def conversation(seed: int, rows: int = 4, turns: int = 30) -> Any:
    """Rows that grow, get other tokens at their ends, ask nothing for a while, and leave."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    texts = {row: [number(0, VOCAB - 1) for _ in range(number(1, 9))] for row in range(rows)}
    for _ in range(turns):
        if len(texts) > 1 and number(0, 9) == 0:
            del texts[sorted(texts)[number(0, len(texts) - 1)]]
        asking = {}
        for row, text in texts.items():
            kept = number(max(1, len(text) - 4), len(text))
            text[kept:] = [number(0, VOCAB - 1) for _ in range(number(0, 6))]
            start = min(kept, len(text))
            asking[row] = (start, len(text) if number(0, 3) else start)
        yield {row: list(text) for row, text in texts.items()}, asking


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_reading_everything_anew(seed: int, attention: str, replayed: bool) -> None:
    model, device = random_guide(), Device()
    model.set_attn_implementation(attention)
    judging = Judging(Guide(model, None), 4, (lambda: Replays(device.capture)) if replayed else None)
    answered = 0
    for texts, asking in conversation(seed):
        ids = torch.zeros((len(texts), max(map(len, texts.values()))), dtype=torch.long)
        for entry, text in enumerate(texts.values()):
            ids[entry, : len(text)] = torch.tensor(text)
        start = torch.tensor([asking[row][0] for row in texts])
        lengths = torch.tensor([asking[row][1] for row in texts])
        found = judging.logits(torch.tensor(list(texts)), ids, lengths, start)
        wanted = {(entry, i) for entry in range(len(texts)) for i in range(int(start[entry]), int(lengths[entry]))}
        if found is None:
            assert not wanted
            continue
        logits, about = found
        given = {
            (entry, int(about[entry, n])): logits[entry, n]
            for entry in range(len(texts))
            for n in range(about.shape[1])
            if about[entry, n] < ids.shape[1]
        }
        assert wanted == set(given)
        for (entry, i), row in given.items():
            with torch.no_grad():
                anew = model(ids[entry : entry + 1, :i]).logits[0, -1]
            torch.testing.assert_close(row, anew, atol=1e-10 if attention == "sdpa" else 1e-5, rtol=0)
            answered += 1
    assert answered > 40
    assert bool(device.made) == replayed


def test_a_guide_whose_kernels_depend_on_its_tokens_is_not_captured() -> None:
    model = random_guide()
    assert Guide(model, None).is_static
    model.model.rotary_emb.rope_type = "dynamic"
    assert not Guide(model, None).is_static
    assert Judging(Guide(model, None), 1, lambda: Replays(Device().capture))._replays is None
    for name in ("num_local_experts", "moe_num_experts"):
        experts = random_guide()
        setattr(experts.config, name, 4)
        assert not Guide(experts, None).is_static


def test_a_guide_that_cannot_be_captured_is_launched() -> None:
    def capture(run: Any) -> Any:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    def answers(replays: Any) -> Iterator[Any]:
        judging = Judging(Guide(random_guide(), None), 1, replays)
        for last in range(5, 12):
            ids, length, start = torch.arange(2, 14)[None], torch.tensor([last]), torch.tensor([3])
            answer = judging.logits(torch.tensor([0]), ids, length, start)
            assert answer is not None
            yield answer[0]

    found = list(answers(None))
    with pytest.warns(UserWarning, match="launched kernel by kernel") as warned:
        found += answers(lambda: Replays(capture))
    assert len(warned) == 1
    assert all(torch.equal(one, other) for one, other in zip(found[:7], found[7:], strict=True))


def test_a_long_prompt_is_read_with_the_kernel_for_causal_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    inner = F.scaled_dot_product_attention

    def noted(*args: Any, attn_mask: Any = None, is_causal: bool = False, **rest: Any) -> Any:
        masks.append((attn_mask is None, is_causal))
        return inner(*args, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    judging = Judging(Guide(random_guide(), None), 2)
    ids, lengths = torch.randint(0, VOCAB, (2, 40)), torch.tensor([40, 25])
    judging.logits(torch.tensor([0, 1]), ids, lengths, lengths - 4)
    assert set(masks) == {(True, True)}


def test_a_row_is_forgotten_outside_inference_mode() -> None:
    judging, ids = Judging(Guide(random_guide(), None), 1), torch.arange(2, 14)[None]
    judging.logits(torch.tensor([0]), ids, torch.tensor([9]), torch.tensor([5]))
    judging.forget(0)
    assert (judging.held < 0).all()


def test_guides_that_place_keys_by_their_own_rules_are_refused() -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 1, "num_heads": 4}
    neo = GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global"], 1]]))
    with pytest.raises(ValueError, match=r"guide='GPTNeoForCausalLM' cannot be cropped"):
        Guide(neo, None)
    flash = random_guide()
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'; use sdpa or eager"):
        Guide(flash, None)


def test_rejected_tokens_take_no_room() -> None:
    judging = Judging(Guide(random_guide(), None), 2)
    draw = torch.Generator().manual_seed(0)
    grown = torch.randint(0, VOCAB, (2, 20), generator=draw)
    for turn in range(40):  # one row keeps a token of eight, the other none
        fresh = torch.randint(0, VOCAB, (2, 8), generator=draw)
        ids = torch.cat((grown, fresh), dim=1)
        ids[1, 20:28] = fresh[1]
        lengths, start = torch.tensor([ids.shape[1], 28]), torch.tensor([20 + turn, 20])
        judging.logits(torch.tensor([0, 1]), ids, lengths, start)
        grown = ids[:, : 21 + turn]
    assert judging.held.shape == (2, 128)  # of 67 tokens, in steps of 64
    assert [(judging.held[row] >= 0).sum().item() for row in (0, 1)] == [66, 27]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("error")
def test_a_guide_gets_its_cache_by_the_name_that_it_has_for_it(name: str) -> None:
    model = random_guide()
    own = Guide(model, None).cache_argument
    given = []

    class Renamed(type(model)):  # type: ignore[misc]  # a class known only now
        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, **more: Any) -> Any:
            given.append(more[name])
            return super().forward(input_ids, attention_mask, position_ids, **{own: more.pop(name)}, **more)

    keyword = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(Renamed.forward)
    *positional, more = signature.parameters.values()
    Renamed.forward.__signature__ = signature.replace(parameters=[*positional, keyword, more])
    texts = [torch.tensor([[5, 6, 7, 8, *rest]]) for rest in ([9, 10], [11, 12, 13])]
    answers = []
    for kind in (type(model), Renamed):
        model.__class__ = kind
        judging = Judging(Guide(model, None), 1)
        for text in texts:
            found = judging.logits(torch.tensor([0]), text, torch.tensor([text.shape[1]]), torch.tensor([4]))
            assert found is not None
            answers.append(found[0])
    assert len(given) == 2
    assert all(cache is judging.cache for cache in given)
    assert all(torch.equal(*pair) for pair in zip(answers[:2], answers[2:], strict=True))


def test_a_guide_whose_head_is_its_embedding_is_loaded(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    assert load_guide(str(tmp_path), torch.device("cpu")).vocab_size == 64


def test_the_last_guide_loaded_is_kept() -> None:
    device = torch.device("cpu")
    assert load_guide("tiny-guide", device) is load_guide("tiny-guide", device)
