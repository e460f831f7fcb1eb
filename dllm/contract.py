"""What every policy keeps to, as checks for one that is written elsewhere.

    for cache in names("cache"):
        assert not violations(lm, MyPolicy(), cache)

They decode a handful of prompts of unequal lengths with random tokens. Use a small model in float64: in lower precision
rounding may decide between near ties, which then depend on the batch. What they cannot see is whether a policy reads
from the device in each step, which is slow on a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dllm.api import generate
from dllm.cache.base import Cache
from dllm.decoding.result import Generation
from dllm.decoding.window import Edit, Window
from dllm.models.loading import LanguageModel
from dllm.samplers import FreeDave
from dllm.samplers.base import Denoise, Sampler

_LENGTHS = (4, 1, 9, 2, 6)  # of the prompts
_DEFAULTS: dict[str, Any] = {"gen_length": 16, "block_length": 6, "stop_at_eos": False}


def violations(
    lm: LanguageModel, sampler: Sampler, cache: str | Cache = "none", seed: int = 0, **options: Any
) -> list[str]:
    """The rules that a policy breaks; empty if it keeps them all.

    Args:
        lm: a loaded model, preferably a small one in float64.
        sampler: the policy.
        cache: the cache it is used with.
        seed: of the prompts, and of what is drawn.
        **options: fields of `dllm.Options`; by default 16 positions in blocks of 6.

    Raises:
        ValueError: as `dllm.generate`, such as for a combination that is refused.
    """
    options = _DEFAULTS | options
    prompts = _prompts(lm, seed)
    watched = _Watched(sampler)

    def run(rows: list[list[int]], policy: Any = sampler, **more: Any) -> Generation:
        return generate(lm, rows, policy, cache, **{"seed": seed, "batch_size": len(rows)} | options | more)

    try:
        together = run(prompts, watched)
    except RuntimeError as error:
        if not re.search("makes no progress|a sampler (wrote|finished)", str(error)):
            raise
        return [f"every step writes in the generated region, and a row ends when it is decoded: {error}"]
    rules = {
        "the inputs of step are unchanged": not watched.changed,
        "every mask is decoded": not (together.completions == lm.backbone.mask_token_id).any(),
        "the same seed gives the same result": _same(*(run(prompts, temperature=1.0) for _ in range(2))),
        # In a batch of two the row numbers of finished requests are used again.
        "a row does not depend on its batch, nor on earlier requests": all(
            _alike(together, row, run([prompt], seed=seed + row), 0) for row, prompt in enumerate(prompts)
        )
        and _same(together, run(prompts, batch_size=2)),
    }
    if sampler.single_forward:
        rules["single_forward: a step depends on one forward alone"] = _drafts_alike(run, prompts, sampler, together)
    broken = [rule for rule, kept in rules.items() if not kept]
    return [f"{rule} ({', '.join(sorted(watched.changed))})" if "inputs" in rule else rule for rule in broken]


@dataclass
class _Watched:
    """A policy whose inputs are compared with what they were."""

    inner: Any
    changed: set[str] = field(default_factory=set)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return repr(self.inner)

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """Take the step of the policy."""
        before = {name: each.clone() for name, each in vars(window).items() if isinstance(each, Tensor)}
        edit: Edit = self.inner.step(window, denoise, state)
        self.changed |= {name for name, each in before.items() if not torch.equal(getattr(window, name), each)}
        return edit


def _prompts(lm: LanguageModel, seed: int) -> list[list[int]]:
    special = {lm.backbone.mask_token_id, *lm.backbone.eos_token_ids}
    known = torch.tensor([token for token in range(lm.backbone.logits_size) if token not in special])
    draw = torch.Generator().manual_seed(seed)
    return [known[torch.randint(len(known), (length,), generator=draw)].tolist() for length in _LENGTHS]


def _drafts_alike(run: Any, prompts: list[list[int]], sampler: Sampler, result: Generation) -> bool:
    """Whether drafts of the policy's own steps give its result; True where drafting is refused."""
    try:
        drafted: Generation = run(prompts, FreeDave(3, sampler))
    except ValueError:
        return True
    return torch.equal(drafted.sequences, result.sequences)


def _same(one: Generation, other: Generation) -> bool:
    return all(_alike(one, row, other, row) for row in range(len(one.completions)))


def _alike(one: Generation, row: int, other: Generation, place: int) -> bool:
    own, theirs = one.completions[row].tolist(), other.completions[place].tolist()
    return own == theirs and int(one.nfe[row]) == int(other.nfe[place])
