"""Speculative diffusion decoding: the denoiser drafts, and the text is the guide's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

import dllm
from contract_rig import PROMPTS, backbones
from dllm.decoding.prediction import Part, Prediction, Sampling
from dllm.guide import Guide
from dllm.guide.rejection import accepted, remainder
from dllm.samplers import ARGuided
from dllm.tasks import word_problems
from dllm.tasks.tokenizer import build_tokenizer
from models import random_dream, random_guide, random_llada
from test_alignment import bpe, permuted

GUIDE = random_guide()
GREEDY = ARGuided(GUIDE, on_reject="guide")
OPTIONS: dict[str, Any] = {"gen_length": 14, "stop_at_eos": False}


@torch.no_grad()
def written(guide: Any, prompt: list[int], count: int, never: int | None = None) -> list[int]:
    """What a guide writes greedily by itself, reading everything again for each token."""
    ids = list(prompt)
    for _ in range(count):
        logits = guide(torch.tensor([ids])).logits[0, -1]
        if never is not None:
            logits[never] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@backbones
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "freecache", "dkv", "dllm_cache", "d2cache"])
@pytest.mark.parametrize(("block", "temperature"), [(6, 0.0), (None, 0.8)])
def test_the_text_is_the_guides_own(make: Any, cache: str, block: int | None, temperature: float) -> None:
    lm = make()
    found = dllm.generate(
        lm, PROMPTS[:5], GREEDY, cache, block_length=block, temperature=temperature, batch_size=3, seed=1, **OPTIONS
    )
    for row, prompt in enumerate(PROMPTS[:5]):
        assert found.completions[row].tolist() == written(GUIDE, prompt, 14, lm.backbone.mask_token_id)


@backbones
def test_the_text_ends_where_the_guides_does(make: Any) -> None:
    lm = make()
    own = [written(GUIDE, prompt, 14, lm.backbone.mask_token_id) for prompt in PROMPTS]
    end = Counter(token for text in own for token in text[:8]).most_common(1)[0][0]
    found = dllm.generate(lm, PROMPTS, GREEDY, gen_length=14, block_length=6, eos_token_id=end)
    ended = 0
    for text, row in zip(own, found.completions.tolist(), strict=True):
        length = text.index(end) + 1 if end in text else 14
        assert row == text[:length] + [end] * (14 - length)
        ended += length < 14
    assert ended > 0


@pytest.mark.parametrize("kind", ["same", "numbered otherwise", "more special tokens"])
@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_trained_models_draft_for_a_guide_with_their_tokens(name: str, kind: str) -> None:
    lm, problems = dllm.load(name, device="cpu"), word_problems.problems(6, 3_000_001)
    assert lm.tokenizer is not None
    known = dllm.guide.load_guide("tiny-guide", torch.device("cpu"))
    guide = {"same": known, "numbered otherwise": permuted()}.get(kind) or with_more(known)
    policy = ARGuided(guide, on_reject="guide")
    found = dllm.generate(lm, [each.question for each in problems], policy, block_length=32, gen_length=48)
    for row, problem in enumerate(problems):
        own = written(known.model, lm.tokenizer(problem.question).input_ids, 48, lm.tokenizer.mask_token_id)
        own = own[: own.index(lm.tokenizer.eos_token_id)]
        assert found.completions[row, : len(own)].tolist() == own
        # As many tokens as the denoiser drafts well come of one forward of the guide.
        assert found.guide_nfe[row] < 0.5 * len(own)


def with_more(guide: Guide) -> Guide:
    """The same guide with special tokens of its own behind the others."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)], special_tokens=True)
    return Guide(guide.model, tokenizer)


@pytest.mark.parametrize(("options", "instead"), [
    ({"on_reject": "guide"}, "on_reject=guide needs .*; use on_reject=draft"),
    ({"accept": "sample"}, "accept=sample needs .*; use accept=argmax"),
])  # fmt: skip
def test_a_guide_with_other_tokens_writes_none(options: dict[str, Any], instead: str) -> None:
    lm = random_llada(tokenizer=True)
    theirs = bpe([("a", "b")], eos_token="<|endoftext|>")
    policy = ARGuided(Guide(random_guide(len(theirs)), theirs), **options)
    with pytest.raises(ValueError, match=instead):
        dllm.generate(lm, ["Tom"], policy, gen_length=4)


SMALL = {"vocab": 8, "sharpness": 2.0}
DRAWS: list[tuple[Any, dict[str, Any]]] = [
    (random_llada, {"temperature": 1.0}),
    (random_dream, {"temperature": 1.0}),
    (random_llada, {"temperature": 0.7, "top_p": 0.9}),
    (random_dream, {"temperature": 1.3, "top_k": 4}),
    (random_llada, {"temperature": 1.0, "block_length": 2, "eos_suppression": "logits"}),
]


@torch.no_grad()
def chance(guide: Any, prompt: list[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of each text of three tokens, by the guide alone; tokens other than [MASK], 7."""
    texts = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, weight in texts.items():
            logits = guide(torch.tensor([[*prompt, *text]])).logits[0, -1]
            logits[7] = -torch.inf
            if sampling.eos_suppression:
                logits[6] = -torch.inf
            one = (logits / sampling.temperature).softmax(-1)
            ranked = one.sort(descending=True)
            before = ranked.values.cumsum(0) - ranked.values
            keep = (before <= (sampling.top_p or 1)) & (torch.arange(8) < (sampling.top_k or 8))
            one[ranked.indices[~keep]] = 0
            longer |= {(*text, token): weight * float(one[token] / one.sum()) for token in range(8) if one[token] > 0}
        texts = longer
    return texts


@pytest.mark.parametrize(("make", "options"), DRAWS, ids=lambda each: str(getattr(each, "__name__", each)))
def test_what_is_drawn_is_distributed_as_the_guide(make: Any, options: dict[str, Any]) -> None:
    lm, guide, count = make(**SMALL), random_guide(vocab=8, sharpness=1.5), 3000
    found = dllm.generate(
        lm, [[1, 4]] * count, ARGuided(guide, accept="sample"), gen_length=3, batch_size=500, stop_at_eos=False, seed=7,
        **options,
    )  # fmt: skip
    known = {name: value for name, value in options.items() if name != "block_length"}
    wanted = chance(guide, [1, 4], Sampling(**known))
    seen = Counter(map(tuple, found.completions.tolist()))
    assert set(seen) <= set(wanted)
    # Texts expected fewer than five times count as one.
    often = {text: count * weight for text, weight in wanted.items() if count * weight >= 5}
    rest = count - sum(often.values()), count - sum(seen[text] for text in often)
    cells = [(often[text], seen[text]) for text in often] + ([rest] if rest[0] >= 1 else [])
    statistic = sum((got - expected) ** 2 / expected for expected, got in cells)
    freedom = len(cells) - 1
    assert len(cells) > 20
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert found.guide_nfe.sum() < 3 * count  # fewer forwards of the guide than tokens


def test_the_drafts_alone_are_distributed_otherwise() -> None:
    # Otherwise the test above would pass whatever were accepted.
    lm, guide = random_llada(**SMALL), random_guide(vocab=8, sharpness=1.5)
    options: dict[str, Any] = {"gen_length": 3, "batch_size": 500, "stop_at_eos": False, "seed": 7, "temperature": 1.0}
    drafts = dllm.generate(lm, [[1, 4]] * 1000, ARGuided(guide, accept="topk", top_k=8), **options)
    wanted, seen = chance(guide, [1, 4], Sampling(1.0)), Counter(map(tuple, drafts.completions.tolist()))
    often = {text: 1000 * weight for text, weight in wanted.items() if 1000 * weight >= 5}
    assert sum((seen[text] - expected) ** 2 / expected for text, expected in often.items()) > 3 * len(often)


@backbones
def test_without_temperature_sampling_is_greedy(make: Any) -> None:
    lm = make()
    sampled, greedy = (
        dllm.generate(lm, PROMPTS, policy, block_length=6, **OPTIONS)
        for policy in (ARGuided(GUIDE, accept="sample"), GREEDY)
    )
    assert torch.equal(sampled.sequences, greedy.sequences)
    assert torch.equal(sampled.guide_nfe, greedy.guide_nfe)


@backbones
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_row_that_samples_ignores_its_batchmates(make: Any, cache: str) -> None:
    lm, policy = make(), ARGuided(GUIDE, accept="sample")
    options: dict[str, Any] = {**OPTIONS, "block_length": 5, "temperature": 0.9, "top_p": 0.95}
    prompts = [*PROMPTS[:4], []]  # before the first token of an empty prompt there is nothing to judge by
    batch = dllm.generate(lm, prompts, policy, cache, batch_size=3, seed=4, **options)
    for row, prompt in enumerate(prompts):
        alone = dllm.generate(lm, [prompt], policy, cache, seed=4 + row, **options)
        assert batch.completions[row].tolist() == alone.completions[0].tolist()
        assert batch.guide_nfe[row] == alone.guide_nfe[0]
        assert batch.nfe[row] == alone.nfe[0]


def test_the_distribution_is_the_one_that_tokens_are_drawn_from() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kinds = [Sampling(0.8, top_k=5), Sampling(), Sampling(1.0, 0.7, eos_suppression="both", eos_token_ids=(6,))]
    counts = torch.zeros(3, 8)
    asked, index = torch.ones((1, 3), dtype=torch.bool), torch.arange(3)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    for _ in range(4000):
        parts = [Part(kind, index[k : k + 1], [(generators[k], 1)]) for k, kind in reversed([*enumerate(kinds)])]
        prediction = Prediction.mixed(logits, asked, index, 7, parts)
        counts[index, prediction.tokens[0]] += 1
    wanted = prediction.distribution()
    assert wanted.sum(-1).tolist() == pytest.approx([1, 1, 1])
    assert float((counts / 4000 - wanted).abs().max()) < 0.03
    assert not counts[wanted == 0].any()
    assert torch.equal(prediction.distribution(logits), wanted)
    assert prediction.distribution(-logits)[1].argmax() != wanted[1].argmax()


def test_drafts_that_the_guide_would_draw_anyway_are_all_accepted() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]]).expand(100, -1).double()
    draft, uniform = torch.arange(100) % 3, torch.arange(100) / 100
    assert accepted(p, p, draft, uniform).all()
    assert (remainder(p, p, uniform) < 3).all()
    one = torch.tensor([[0.0, 1.0, 0.0]]).double().expand(100, -1)
    assert torch.equal(accepted(one, p, draft, uniform), draft == 1)
    assert set(remainder(p, one, uniform).tolist()) == {0, 2}


@pytest.mark.parametrize(("name", "value", "use"), [("top_k", 3, "topk or ratio"), ("ratio", 0.5, "ratio")])
def test_options_that_do_not_go_with_sampling_are_refused(name: str, value: float, use: str) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} has no effect with accept=sample; use accept={use}"):
        ARGuided(GUIDE, accept="sample", **{name: value})  # type: ignore[arg-type]


def test_sampling_replaces_what_is_rejected_whatever_on_reject_says() -> None:
    options: dict[str, Any] = {**OPTIONS, "temperature": 1.0, "seed": 2}
    one, other = (
        dllm.generate(random_llada(), PROMPTS, ARGuided(GUIDE, "sample", on_reject=each), **options)  # type: ignore[arg-type]
        for each in ("draft", "guide")
    )
    assert torch.equal(one.sequences, other.sequences)
