"""What the contract suites of policies and of caches share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import pytest

import dllm
from dllm.resolve import resolve
from dllm.samplers import (
    EB,
    KLASS,
    PC,
    ARGuided,
    Certainty,
    Credit,
    Hierarchical,
    Learn2PD,
    Prophet,
    SlowFast,
)
from dllm.samplers.base import Sampler
from models import (
    random_dream,
    random_fast_dllm,
    random_filter,
    random_frequencies,
    random_guide,
    random_llada,
    random_llada2,
    random_llada_moe,
    random_sdar,
    random_sdar_moe,
)
from policies import over_masks

Maker: TypeAlias = Callable[..., dllm.LanguageModel]
BACKBONES = {"llada": random_llada, "dream": random_dream}
# One of each further family; the first four are causal over blocks.
MORE_BACKBONES: dict[str, Maker] = {
    "llada2": random_llada2,
    "fast_dllm": random_fast_dllm,
    "sdar_moe": random_sdar_moe,
    "sdar": random_sdar,
    "llada_moe": random_llada_moe,
}
more_backbones = pytest.mark.parametrize("make", MORE_BACKBONES.values(), ids=MORE_BACKBONES)
backbones = pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
LEARNED = Learn2PD(random_filter(), threshold=0.8, allow_mismatch=True)
GUIDED = ARGuided(random_guide(), accept="topk", top_k=9)
# What these come with is for the bundled models.
BY_NAME: dict[str, Any] = {name: resolve("sampler", name, Sampler) for name in over_masks()}
BY_NAME |= {"learn2pd": LEARNED, "ar_guided": GUIDED, "pc": PC(random_frequencies())}
# With their own options these hardly ever commit more than one token of a random model.
BY_NAME |= {
    "certainty": Certainty(3.0, 0.2), "credit": Credit(0.6, 3.0, 0.5), "eb": EB(3.0, "entropy"),
    "hierarchical": Hierarchical(0.5, 0.1), "klass": KLASS(0.2, 0.8, 1), "prophet": Prophet(None, 4.0, 2.5, 1.5),
    "slowfast": SlowFast(0.4, 0.3, 1, 1),
}  # fmt: skip
# Of models whose attention is causal over blocks as well: they do not see the end of the canvas.
IN_ORDER = {name: sampler for name, sampler in BY_NAME.items() if name != "daedal"}
# No empty prompt here: all masks are alike then, and rounding alone decides among them.
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50], [11, 12], [30, 31, 32, 33], [8, 8], [4, 40, 4, 40, 4]]


@cache
def common_token(make: Maker) -> int:
    """What a model writes most: as end-of-text it lets rows leave their batch at different times."""
    written = dllm.generate(make(), PROMPTS, "vanilla", gen_length=22, block_length=8, stop_at_eos=False).completions
    return int(written.flatten().mode().values)
