"""What holds for every sampler over every backbone, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import dllm
from contract_rig import BY_NAME, GUIDED, LEARNED, PROMPTS, Maker, backbones, common_token
from dllm.samplers import (
    KLASS,
    T2M,
    AdaBlock,
    Daedal,
    Editing,
    EntropyThreshold,
    Factor,
    FreeDave,
    Learn2PD,
    LocalLeap,
    LoPA,
    MultiBlock,
    Oracle,
    ReMDM,
    Saber,
    Threshold,
    Vanilla,
    Wino,
)
from dllm.samplers.base import Sampler
from models import random_llada
from toys import Drafting, Refreshing, Remembering, Revoking, Rewriting, Stalling, Vandal, Watching

SAMPLERS: dict[str, Any] = {
    **BY_NAME,
    "adablock-short": AdaBlock(0.5, range(0, 62, 3), 0.05, 0.6),
    "daedal-short": Daedal(4, 3, 0.2, 0.9, 0.5, 0.3, 4),
    "vanilla-steps": Vanilla(steps=10),
    "vanilla-3": Vanilla(tokens_per_step=3),
    "vanilla-timestep": Vanilla(steps=11, schedule="timestep"),
    "vanilla-margin": Vanilla(order="margin"),
    "vanilla-entropy": Vanilla(order="entropy", tokens_per_step=2),
    "vanilla-random": Vanilla(order="random"),
    "threshold-0.3": Threshold(0.3),
    "threshold-paced": Threshold(0.2, steps=8),
    "factor-3": Factor(3.0),
    "entropy-2": EntropyThreshold(2.0),
    "lopa-wide": LoPA(0.5, 3, 0.1),
    "localleap-wide": LocalLeap(0.5, 0.2, 3),
    "klass-block": KLASS(0.2, 0.8, 1, ahead=False),
    "learn2pd-cut": replace(LEARNED, eotp="published"),
    "learn2pd-accepted": replace(LEARNED, eotp="accepted"),
    "learn2pd-safe": replace(LEARNED, eotp="safe"),
    "freedave-tree": FreeDave(3, draft_mode="tree"),
    "freedave-eager": FreeDave(6, eager=True),
    "freedave-threshold": FreeDave(5, Threshold(0.3), eager=True),
    "freedave-learned": FreeDave(3, LEARNED),
    "ar_guided-ratio": replace(GUIDED, accept="ratio", ratio=0.2, on_reject="guide"),
    "ar_guided-sample": replace(GUIDED, accept="sample", top_k=None),
    "multiblock-early": MultiBlock(Threshold(0.3), 3, 0.0, 0.5, 0.2),
    "oracle-threshold": Oracle(Threshold(0.3)),
    "remdm-loop": ReMDM(10, "rescale", 0.5, True, loop=2, loop_at=0.5),
    "t2m-change": T2M(0.3, "change", 0.2),
    "wino-wide": Wino(0.2, 0.6, 2),
    "drafting": Drafting(),
    "remembering": Remembering(),
    "revoking": Revoking(),
}


def only(keep: Callable[[Any], bool], variants: bool = True) -> Any:
    """Parametrise over the samplers that a rule applies to; without `variants`, all but those of BY_NAME are spare."""
    return pytest.mark.parametrize(
        "sampler",
        [
            pytest.param(
                sampler, id=name,
                # Those of a group share `exact`.
                marks=[
                    pytest.mark.xdist_group(f"contract-{name}"),
                    *[pytest.mark.spare] * (not variants and name not in BY_NAME),
                ],
            )
            for name, sampler in SAMPLERS.items()
            if keep(sampler)
        ],
    )  # fmt: skip


def by_place(sampler: Any) -> bool:
    """Whether it may prefer a position to its equals for where it stands."""
    base = getattr(sampler, "base", sampler)
    several = isinstance(sampler, MultiBlock)  # commits ahead
    return several or isinstance(base, (Daedal, Drafting, LoPA, Revoking, Saber, Learn2PD, ReMDM, T2M))


def revises(sampler: Any) -> bool:
    """Whether it takes committed tokens back."""
    return isinstance(sampler, (ReMDM, Revoking, Saber, T2M, Wino))


def cuts(sampler: Any) -> bool:
    """Whether it ends rows early."""
    return isinstance(sampler, Learn2PD) and sampler.eotp != "off"


samplers = only(lambda sampler: True)
named = only(lambda sampler: True, variants=False)
BLOCK = 5
LENGTH = 12  # two blocks and a shorter one


def run(
    lm: dllm.LanguageModel, prompts: list[list[int]], sampler: Any, cache: Any = "none", **options: Any
) -> dllm.Generation:
    defaults = {"gen_length": LENGTH, "block_length": BLOCK, "batch_size": 8, "stop_at_eos": False, "seed": 3}
    return dllm.generate(lm, prompts, sampler, cache, **defaults | options)


_exact: dict[tuple[Maker, int], dllm.Generation] = {}


def exact(make: Maker, sampler: Any) -> dllm.Generation:
    """What one of SAMPLERS makes of all prompts, without a cache."""
    key = make, id(sampler)
    if key not in _exact:
        _exact[key] = run(make(), PROMPTS, sampler)
    return _exact[key]


@pytest.mark.covering(2)
@backbones
@samplers
def test_finishes_without_masks_and_leaves_the_prompt(make: Maker, sampler: Any) -> None:
    result = exact(make, sampler)
    assert not (result.completions == make().backbone.mask_token_id).any()
    for prompt, row in zip(PROMPTS, result.sequences, strict=True):
        assert row[len(row) - LENGTH - len(prompt) : -LENGTH].tolist() == prompt


@pytest.mark.covering(2)
@backbones
@samplers
def test_row_result_ignores_batchmates(make: Maker, sampler: Any) -> None:
    lm, prompts, together = make(), PROMPTS[:5], exact(make, sampler)
    few = run(lm, prompts, sampler, batch_size=3)
    assert torch.equal(few.sequences, together.sequences[:5])
    assert torch.equal(few.commit_step, together.commit_step[:5])
    assert torch.equal(few.nfe, together.nfe[:5])
    for row in (1, 4):  # without padding as well; the last one begins beside others
        single = run(lm, [prompts[row]], sampler, seed=[3 + row])
        assert few.completions[row].tolist() == single.completions[0].tolist()
        assert few.commit_step[row].tolist() == single.commit_step[0].tolist()
        assert few.nfe[row] == single.nfe[0]


@backbones
@only(
    lambda sampler: (
        sampler not in (Vanilla(steps=10), Vanilla(steps=11, schedule="timestep"), Threshold(0.2, steps=8))
        and getattr(sampler, "steps", None) != 10
        and not cuts(sampler)
        and not isinstance(sampler, Daedal)
    )
)
@pytest.mark.parametrize("block_length", [4, None])
def test_infilled_row_ignores_batchmates(make: Maker, sampler: Any, block_length: int | None) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, m], [3, m, m, 4], [1, 2, 3, 4, 5, 6, m, 7, *[m] * 7, 9], [8, m]]
    batch = dllm.infill(lm, rows, sampler, block_length=block_length, seed=5)
    for i, row in enumerate(rows):
        alone = dllm.infill(lm, [row], sampler, block_length=block_length, seed=5 + i)
        assert batch.sequences[i, -len(row) :].tolist() == alone.sequences[0].tolist()
        assert batch.nfe[i] == alone.nfe[0]


@pytest.mark.parametrize(
    "sampler", [Vanilla(steps=6), Vanilla(steps=6, schedule="timestep"), Threshold(0.2, steps=6)], ids=repr
)
def test_infilled_rows_of_unequal_spans_share_their_own_steps(sampler: Any) -> None:
    lm = random_llada()
    m = lm.backbone.mask_token_id
    rows = [[4, *[m] * 9], [5, 6, *[m] * 17]]
    batch = dllm.infill(lm, rows, sampler, block_length=4)
    for i, row in enumerate(rows):
        alone = dllm.infill(lm, [row], sampler, block_length=4)
        assert batch.sequences[i, -len(row) :].tolist() == alone.sequences[0].tolist()
        assert batch.nfe[i] == alone.nfe[0] <= 6


@backbones
@samplers
def test_row_result_ignores_batchmates_when_rows_stop_and_draw(make: Maker, sampler: Any) -> None:
    lm = make()
    options = {"stop_at_eos": True, "eos_token_id": common_token(make), "temperature": 0.7, "top_p": 0.95}
    prompts = PROMPTS[:5]
    batch = run(lm, prompts, sampler, seed=9, **options)
    for row in (0, 2, 4):
        single = run(lm, [prompts[row]], sampler, seed=9 + row, **options)
        assert batch.completions[row].tolist() == single.completions[0].tolist()
        assert batch.nfe[row] == single.nfe[0]


@backbones
@only(
    lambda sampler: not isinstance(sampler, (Daedal, Drafting, Editing, T2M)) and not getattr(sampler, "loop", 0)
)  # by design
def test_every_forward_commits(make: Maker, sampler: Any) -> None:
    result = exact(make, sampler)
    assert (result.nfe <= LENGTH).all()
    for row, nfe in zip(result.commit_step.tolist(), result.nfe.tolist(), strict=True):
        if cuts(sampler):
            assert set(row) <= set(range(-1, nfe))
            continue
        # A revoked position carries its last commit only, so the steps may have gaps.
        if not revises(sampler):
            assert set(row) == set(range(nfe))
        assert max(row) == nfe - 1 and min(row) >= 0


@backbones
@named
def test_same_seed_same_result(make: Maker, sampler: Any) -> None:
    lm, prompts = make(), PROMPTS[:4]
    first, again, other = (run(lm, prompts, sampler, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)


@backbones
@only(lambda sampler: sampler != Vanilla(order="random") and not isinstance(sampler, ReMDM), variants=False)
def test_greedy_needs_no_seed(make: Maker, sampler: Any) -> None:
    assert torch.equal(exact(make, sampler).sequences, run(make(), PROMPTS, sampler, seed=None).sequences)


@backbones
@named
def test_inputs_are_left_alone(make: Maker, sampler: Any) -> None:
    lm = make()
    inner = dllm.resolve.resolve("sampler", sampler, Sampler)
    prompts = torch.tensor([[5, 9, 3], [6, 1, 2]])
    kept = prompts.clone()
    watched = dllm.generate(
        lm, prompts, Watching(inner), gen_length=LENGTH, block_length=BLOCK, stop_at_eos=False, seed=0
    )
    plain = dllm.generate(lm, prompts, inner, gen_length=LENGTH, block_length=BLOCK, stop_at_eos=False, seed=0)
    assert torch.equal(prompts, kept)
    assert torch.equal(watched.sequences, plain.sequences)


@backbones
@samplers
def test_a_cache_that_refreshes_at_every_step_is_no_cache(make: Maker, sampler: Any) -> None:
    plain, refreshed = exact(make, sampler), run(make(), PROMPTS, sampler, Refreshing())
    assert torch.equal(plain.sequences, refreshed.sequences)
    assert torch.equal(plain.nfe, refreshed.nfe)
    assert refreshed.stats.cache_refreshes == int(refreshed.nfe.sum())


@backbones
def test_a_cache_may_compute_any_columns(make: Maker) -> None:
    lm, longer = make(), {"gen_length": 22, "block_length": 8}
    result = run(lm, PROMPTS[:3], "threshold", Refreshing(narrow=True), **longer)
    assert not (result.completions == lm.backbone.mask_token_id).any()
    assert result.stats.computed_share < 0.7
    # Stale keys change something on a random model; otherwise this test would not see the store at all.
    assert not torch.equal(result.sequences, run(lm, PROMPTS[:3], "threshold", **longer).sequences)


@backbones
@only(lambda sampler: sampler != Vanilla(order="random") and not by_place(sampler))
def test_ties_go_to_the_leftmost(make: Maker, sampler: Any) -> None:
    lm = make()
    with torch.no_grad():
        lm.backbone.get_output_embeddings().weight.zero_()
    steps = run(lm, PROMPTS, sampler).commit_step
    assert torch.equal(steps, steps.sort(dim=1).values)


@backbones
def test_a_guided_run_is_one_forward_a_step(make: Maker) -> None:
    lm = make()
    plain, guided = run(lm, PROMPTS, "vanilla"), run(lm, PROMPTS, "vanilla", cfg_scale=1.5)
    assert guided.nfe.tolist() == [LENGTH] * len(PROMPTS)
    assert not torch.equal(plain.sequences, guided.sequences)
    alone = run(lm, PROMPTS[2:3], "vanilla", cfg_scale=1.5)
    assert guided.completions[2].tolist() == alone.completions[0].tolist()


@backbones
def test_an_empty_prompt_generates(make: Maker) -> None:
    lm = make()
    result = run(lm, [[], [3, 4]], "threshold")
    assert not (result.completions == lm.backbone.mask_token_id).any()
    assert result.completions[1].tolist() == run(lm, [[3, 4]], "threshold").completions[0].tolist()


def test_a_cache_may_refuse_a_run_before_the_first_forward() -> None:
    lm = random_llada()
    lm.backbone.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
    with pytest.raises(ValueError, match="it is a toy; use cache=none, or cfg_scale=0"):
        run(lm, PROMPTS, "vanilla", Refreshing(), cfg_scale=1.0)


def test_a_sampler_that_makes_no_progress_is_stopped() -> None:
    with pytest.raises(RuntimeError, match="makes no progress in request 0"):
        run(random_llada(), PROMPTS, Stalling())


def test_a_sampler_that_only_rewrites_is_stopped() -> None:
    with pytest.raises(RuntimeError, match="makes no progress in request 0"):
        run(random_llada(), [[1, 2]], Rewriting())


def test_a_cache_that_leaves_out_a_column_that_is_read_fails() -> None:
    with pytest.raises(IndexError):
        run(random_llada(), [[1, 2]], "vanilla", Refreshing(short=True))


def test_a_sampler_cannot_touch_the_prompt() -> None:
    with pytest.raises(RuntimeError, match="outside the generated region"):
        run(random_llada(), [[1, 2, 3]], Vandal())


def test_one_sampler_serves_runs_at_once() -> None:
    lm, sampler = random_llada(), Remembering()
    streams = [
        dllm.stream(lm, [prompt], sampler, gen_length=LENGTH, block_length=BLOCK, stop_at_eos=False)
        for prompt in PROMPTS[:3]
    ]
    frames: list[Any] = [None] * 3
    for together in zip(*streams, strict=True):
        frames = list(together)
    for prompt, frame in zip(PROMPTS[:3], frames, strict=True):
        assert frame.tokens[0].tolist() == run(lm, [prompt], sampler).sequences[0].tolist()


@only(lambda sampler: not cuts(sampler) and not isinstance(sampler, Daedal))  # which fill rows with end-of-text
def test_what_is_never_predicted_is_never_written(sampler: Any) -> None:
    lm = random_llada(seed=2)
    eos = lm.backbone.eos_token_ids[0]
    lm.backbone.get_output_embeddings().weight.data[eos] *= 3
    if isinstance(sampler, Vanilla) and sampler == Vanilla():
        assert (run(lm, PROMPTS[:2], sampler).completions == eos).any()
    assert not (run(lm, PROMPTS[:2], sampler, eos_suppression="logits").completions == eos).any()
