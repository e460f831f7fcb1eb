"""Accepting within an entropy bound and renoising, as transformers does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.models import FAMILIES
from dllm.samplers import Renoise
from models import random_diffusion_gemma, random_dream, random_llada, random_sdar

pytestmark = pytest.mark.skipif("diffusion_gemma" not in FAMILIES, reason="needs transformers 5.13")
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [50]]
FAST = Renoise(max_steps=6, entropy_bound=2.0, stability_threshold=0, confidence_threshold=0.5)


def published(lm: dllm.LanguageModel, prompt: list[int], sampler: Renoise, seed: int, **options: Any) -> list[int]:
    """What transformers' own loop generates."""
    torch.manual_seed(seed)
    model: Any = lm.backbone
    model.generation_config = model.generation_config_class()
    settings = {
        "max_denoising_steps": sampler.max_steps, "t_min": sampler.t_min, "t_max": sampler.t_max,
        "stability_threshold": sampler.stability_threshold, "confidence_threshold": sampler.confidence_threshold,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": sampler.entropy_bound},
    }  # fmt: skip
    config = model.generation_config_class(disable_compile=True, **settings | options)
    with torch.no_grad():
        found: list[int] = model.generate(torch.tensor([prompt]), generation_config=config).sequences[0].tolist()
    return found


@pytest.mark.parametrize("cache", ["none", "block"])
@pytest.mark.parametrize(
    "sampler",
    [
        FAST,
        Renoise(5, 0.1, 0.1, 0.9, 0, 1.2),
        Renoise(4, 3.0, 0.4, 0.8, 2, 0.005),
        Renoise(12, 0.5, 0.01, 0.05, 1, 0.1),
    ],
    ids=["fast", "unstable", "patient", "cold"],
)
def test_a_seed_generates_as_the_method_of_transformers(sampler: Renoise, cache: str) -> None:
    lm = random_diffusion_gemma(dtype=torch.float32, window=6)
    decoders = []
    hook = lm.backbone.model.decoder.norm.register_forward_hook(lambda *_: decoders.append(1))
    for seed, prompt in enumerate(PROMPTS):
        found = dllm.generate(lm, [prompt], sampler, cache, gen_length=24, seed=seed, stop_at_eos=False)
        decoders.clear()
        assert found.sequences[0].tolist() == published(lm, prompt, sampler, seed, max_new_tokens=24)
        assert int(found.nfe[0]) == len(decoders)
    hook.remove()


def test_an_end_of_text_ends_a_row_with_its_block() -> None:
    lm, ends = random_diffusion_gemma(dtype=torch.float32), [3, 9, 17, 24, 40, 41, 42, 55]
    stopped = 0
    for seed, prompt in enumerate(PROMPTS):
        found = dllm.generate(lm, [prompt], FAST, gen_length=32, seed=seed, eos_token_id=ends)
        true = published(lm, prompt, FAST, seed, max_new_tokens=32, eos_token_id=ends, pad_token_id=0)
        count = len(prompt) + found.stats.tokens
        assert found.sequences[0].tolist()[:count] == true[:count]
        assert all(token == 0 for token in true[count:])
        stopped += len(true) < len(prompt) + 32
    assert stopped > 0


@pytest.mark.parametrize("cache", ["none", "block", "prefix", "dual", "freecache"])
@pytest.mark.parametrize("sampler", [FAST, Renoise(16, 2.0, 0.1, 0.3, 1, 0.3)], ids=["fast", "stable"])
def test_rows_ignore_their_batchmates(sampler: Renoise, cache: str) -> None:
    lm = random_diffusion_gemma()
    options: dict[str, Any] = {"gen_length": 20, "stop_at_eos": False}
    together = dllm.generate(lm, PROMPTS, sampler, cache, batch_size=3, seed=[4, 5, 4, 7], **options)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, [4, 5, 4, 7], strict=True)):
        alone = dllm.generate(lm, [prompt], sampler, seed=seed, **options)
        assert together.completions[row].tolist() == alone.completions[0].tolist()
        assert together.nfe[row] == alone.nfe[0]
    assert len(set(together.nfe.tolist())) > 1


def test_a_block_that_does_not_change_takes_its_steps() -> None:
    lm = random_diffusion_gemma(sharpness=40.0)
    sampler = Renoise(30, entropy_bound=1e9, t_min=0.0, t_max=1e-3, confidence_threshold=0.0)
    unchanged: list[bool] = []
    out = dllm.generate(
        lm, [[5, 6, 7]], sampler, gen_length=8, seed=1, stop_at_eos=False,
        callback=lambda step: unchanged.append(not step.change.committed.any()),
    )  # fmt: skip
    assert out.nfe.tolist() == [30]
    assert sum(unchanged) > 8


def test_nothing_accepted_is_final() -> None:
    lm = random_diffusion_gemma()
    steps: list[Any] = []
    out = dllm.generate(lm, [[5, 6, 7]], Renoise(8), gen_length=16, seed=1, callback=steps.append, stop_at_eos=False)
    assert not (out.completions == lm.backbone.mask_token_id).any()
    assert any(step.change.revoked.any() for step in steps)
    assert out.nfe.tolist() == [16]


@given(
    st.lists(st.floats(0, 4), min_size=1, max_size=9, unique=True), st.floats(0, 5), st.floats(0, 5)
)  # fmt: skip
def test_a_larger_bound_accepts_at_least_as_many_and_the_surest_always(
    entropies: list[float], one: float, other: float
) -> None:
    values = torch.tensor([entropies], dtype=torch.float64)
    low, high = (Renoise(entropy_bound=bound)._accepted(values)[0] for bound in sorted((one, other)))
    assert (high | ~low).all()
    assert low[values[0].argmin()]
    chosen = values[0][low]
    assert float(chosen.sum() - chosen.max()) <= min(one, other) + 1e-9


def test_a_row_without_finite_logits_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_diffusion_gemma()
    decode = lm.backbone.decode

    def damaged(finished: Any, block: Any) -> torch.Tensor:
        logits = decode(finished, block)
        logits[(finished.tokens == 33).any(1)] = torch.nan
        return logits

    whole = dllm.generate(lm, [[6, 7]], FAST, gen_length=8, seed=1)
    monkeypatch.setattr(lm.backbone, "decode", damaged)
    out = dllm.generate(lm, [[5, 33], [6, 7]], FAST, gen_length=8, seed=0)
    assert "NaN or infinite" in str(out.errors[0])
    assert out.errors[1] is None
    assert out.completions[1].tolist() == whole.completions[0].tolist()


@pytest.mark.parametrize("make", [random_llada, random_dream, random_sdar])
def test_models_with_masks_are_refused_in_one_line(make: Any) -> None:
    lm = make()
    with pytest.raises(ValueError, match=r"is not compatible with a policy over uniformly random tokens") as caught:
        dllm.generate(lm, [[1, 2]], "renoise", gen_length=8)
    assert "it has [MASK] at undecided positions; use eb or remdm" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "temperature=0.5 has no effect on renoise, which has a schedule; set t_min and t_max"),
        ({"gen_length": 2}, "max_steps=48 is out of range; use at most 32"),
    ],
)
def test_requests_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        dllm.generate(random_diffusion_gemma(), [[1, 2]], "renoise", **{"gen_length": 8, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 0}, {"max_steps": 1.5}, {"entropy_bound": -1.0}, {"t_min": -0.1}, {"t_max": 0.0},
        {"t_min": 0.9, "t_max": 0.8}, {"stability_threshold": -1}, {"confidence_threshold": -1.0},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    name = "t_max" if len(options) > 1 else next(iter(options))
    with pytest.raises(ValueError, match=f"^{name}="):
        Renoise(**options)
