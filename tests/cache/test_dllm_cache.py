"""dLLM-Cache: the prompt rarely, the response often, in between what changed most."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange

import dllm
from cache_rig import planned, selected
from dllm.cache import DLLMCache
from dllm.cache.dllm_cache import Features
from dllm.models.transformer import rotary_embedding
from models import random_dream, random_llada
from sampler_rig import facts
from toys import Leftmost


@pytest.mark.parametrize(("lm", "shift"), [(random_llada(), 0), (random_dream(), 1)], ids=["llada", "dream"])
def test_the_prompt_is_computed_at_its_own_interval(lm: dllm.LanguageModel, shift: int) -> None:
    log, result = planned(lm, 3, DLLMCache(4, 2, 0.5), Leftmost(), gen_length=9, block_length=4)
    whole = [*range(12)]
    assert log == [whole if forward % 4 == 0 else whole[3 - shift :] for forward in range(9)]
    # Prompt and response together are computed in forwards 0, 4 and 8.
    assert result.stats.cache_refreshes == 3


def test_the_share_computed_is_what_the_ratio_says() -> None:
    lm = random_llada(layers=3)
    log, result = planned(lm, 3, DLLMCache(100, 100, 0.25), Leftmost(), gen_length=8)
    # One forward over everything; then the first layer computes 8 columns and the two others 2.
    assert len(log) == 8
    assert result.stats.computed_columns == 11 + 7 * (8 + 2 * 2) // 3


def store_and_partial(needed: list[int], ratio: float = 0.5) -> tuple[Features, Any]:
    store = Features(ratio, facts())
    columns = np.arange(4, 12)[None]
    store.response[0, 4:] = True
    store.needed[0, needed] = True
    return store, store.bind(selected(columns))


def test_a_layer_computes_the_columns_whose_values_turned_most() -> None:
    store, partial = store_and_partial(needed=[])
    stored = torch.eye(4, dtype=torch.float64)[0].expand(8, 4)
    store.values[:, 0, 0, 4:12] = stored
    angle = torch.tensor([0.0, 0.3, 0.1, 0.9, 0.2, 0.5, 0.0, 0.8], dtype=torch.float64)
    # Length says nothing, direction does.
    fresh = torch.stack((angle.cos(), angle.sin(), 0 * angle, 0 * angle), -1) * torch.arange(1, 9)[:, None]
    assert sorted(partial.stale(1, fresh[None, None])[0].tolist()) == [1, 3, 5, 7]
    # The first layer takes the whole response.
    assert sorted(partial.stale(0, fresh[None, None])[0].tolist()) == [*range(8)]


@pytest.mark.parametrize(("dtype", "turn"), [(torch.bfloat16, 0.05), (torch.float32, 1e-4)], ids=str)
def test_small_changes_are_ranked_as_in_float64(dtype: torch.dtype, turn: float) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    # Turned by so little that the similarities themselves are nearly all the same number.
    amount = turn * torch.tensor([1.0, 1.6, 1.3, 1.9, 1.1, 1.7, 1.2, 1.8], dtype=torch.float64)[:, None]
    fresh = stored + amount * torch.randn(8, 4, generator=generator, dtype=torch.float64).sign()
    stored, fresh = stored.to(dtype), fresh.to(dtype)
    picked = []
    for each in (torch.float64, dtype):
        store, partial = store_and_partial(needed=[])
        store.values = store.values.to(each)
        store.values[:, 0, 0, 4:12] = stored.to(each)
        picked.append(partial.stale(1, fresh.to(each)[None, None])[0].tolist())
    assert picked[0] == picked[1]


def test_ties_go_to_the_leftmost_and_what_is_needed_comes_in_any_case() -> None:
    store, partial = store_and_partial(needed=[11])
    store.values[:] = 1
    chosen = partial.stale(1, torch.ones(1, 1, 8, 4, dtype=torch.float64))
    assert sorted(chosen[0].tolist()) == [0, 1, 2, 3, 7]


def test_without_a_ratio_layers_behind_the_first_reuse_everything() -> None:
    _, partial = store_and_partial(needed=[], ratio=0.0)
    assert partial.stale(1, torch.rand(1, 1, 8, 4, dtype=torch.float64)).shape == (1, 0)


@torch.inference_mode()
def spelt_out(lm: dllm.LanguageModel, prompt: list[int], cache: DLLMCache, generated: int) -> list[int]:
    """One token per step in one block, everything kept in plain tensors, similarities in float64."""
    backbone: Any = lm.backbone
    config, mask, start = backbone.config, backbone.mask_token_id, len(prompt)
    head = config.hidden_size // config.num_attention_heads
    tokens = torch.tensor([*prompt, *[mask] * generated])
    rotate = rotary_embedding(torch.arange(len(tokens))[None], head, config.rope_theta, backbone.dtype)
    kept: dict[tuple[str, int], torch.Tensor] = {}

    def keep(name: str, layer: int, index: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        whole = kept.setdefault((name, layer), torch.zeros(len(tokens), fresh.shape[-1], dtype=fresh.dtype))
        whole[index] = fresh
        return whole

    for step in range(generated):
        x = backbone.get_input_embeddings()(tokens)
        for layer, block in enumerate(backbone.blocks):
            parts, wanted = block.parts, torch.zeros(len(tokens), dtype=torch.bool)
            h = parts.attention_norm(x)
            wanted[:start] = step % cache.prompt_interval == 0
            wanted[start:] = layer == 0 or step % cache.response_interval == 0
            if not wanted[start:].any():
                now, before = parts.value(h)[start:].double(), kept["value", layer][start:].double()
                similarity = torch.nn.functional.cosine_similarity(now, before, dim=-1)
                wanted[start + similarity.argsort(stable=True)[: int(cache.ratio * generated)]] = True
            index, response = wanted.nonzero()[:, 0], torch.arange(start, len(tokens))
            v = keep("value", layer, torch.cat((index, response)), parts.value(h[torch.cat((index, response))]))
            q, k = parts.query(h), keep("key", layer, index, parts.key(h[index]))
            q, k, v = (rearrange(each, "c (h d) -> 1 h c d", d=head) for each in (q, k, v))
            seen = torch.nn.functional.scaled_dot_product_attention(rotate(q)[:, :, index], rotate(k), v)
            x = x + keep("attention", layer, index, parts.output(rearrange(seen, "1 h c d -> c (h d)")))
            h = parts.feed_forward_norm(x[index])
            x = x + keep("mlp", layer, index, parts.feed_forward(h))
        probabilities = backbone.get_output_embeddings()(backbone.final_norm(x)).softmax(-1)
        probabilities[:, mask] = 0
        best = probabilities.max(-1)
        place = int(best.values.masked_fill(tokens != mask, -1).argmax())
        tokens[place] = best.indices[place]
    return tokens[start:].tolist()


@pytest.mark.parametrize("seed", range(2))
def test_decodes_in_float32_as_the_method_spelt_out(seed: int) -> None:
    lm, cache = random_llada(seed=seed, layers=3, dtype=torch.float32), DLLMCache(16, 4, 0.25)
    for prompt in ([5, 6, 7, 8, 9], [1, 2]):
        result = dllm.generate(lm, [prompt], "vanilla", cache, gen_length=40, block_length=40, stop_at_eos=False)
        assert result.completions[0].tolist() == spelt_out(lm, prompt, cache, 40)


@pytest.mark.parametrize("options", [{"prompt_interval": 0}, {"response_interval": 0}, {"ratio": 1.5}, {"ratio": -0.1}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        DLLMCache(**options)
