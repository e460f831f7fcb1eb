# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write and test your own policy
#
# A policy is a frozen dataclass of its options that subclasses `Policy`. In each step it sees the active block of
# every row (a `Window`), asks for predictions, and returns an `Edit`. The engine does the rest: batches, blocks,
# caches, end-of-text, stop strings, statistics.

# %%
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

import dllm
from dllm.contract import violations
from dllm.decoding.window import Edit, Window
from dllm.resolve import names
from dllm.samplers.base import Denoise, Policy, commit
from dllm.samplers.selection import top

torch.set_num_threads(1)  # for a model this small, more threads are slower

# %% [markdown]
# As an example, a confidence threshold that rises with the distance from the first mask: near the text that is there,
# 0.9 may do; far ahead, the prediction should be nearly certain.
#
# Per step: commit every mask at distance d from the block's first mask with 1 - p <= (1 - threshold) * decay^d, and
# always the most confident one.
#
# Tensors are (B, K): rows by positions of the block. Nothing is read from the device (`.item()`, `if x.any()`),
# inputs are never changed, and what a row gets depends on that row alone.


# %%
@dataclass(frozen=True)
class Near(Policy):
    """A threshold that rises with the distance from the first mask.

    Args:
        threshold: of the first mask.
        decay: of the tolerance, per position.
    """

    single_forward = True  # a step is one forward, and nothing is remembered: drafting policies may run it

    threshold: float = 0.9
    decay: float = 0.9

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """Commit what is certain enough for its place."""
        prediction = denoise()
        place = torch.arange(window.masked.shape[1], device=window.masked.device)
        first = window.masked.int().argmax(-1, keepdim=True)
        tolerance = (1 - self.threshold) * self.decay ** (place - first).clamp(min=0)
        certain = (1 - prediction.confidence <= tolerance) & window.masked
        return commit(window, prediction, certain | top(prediction.confidence, 1, window.masked))


# %% [markdown]
# It is used like any other, with any cache, and can be the base of drafting policies:

# %%
lm = dllm.load("tiny-llada")
question = "Tom has 23 apples. He buys 12. Then he gives away 8. How many apples does he have?"
options = {"gen_length": 64, "block_length": 32}
dllm.generate(lm, question, Near(), **options)

# %%
dllm.generate(lm, question, dllm.samplers.FreeDave(4, Near(0.999)), **options)

# %% [markdown]
# ## Test it
#
# `dllm.contract.violations` decodes a few random prompts and names the rules that a policy breaks: masks left, inputs
# changed, results that depend on batch mates, on earlier requests or on anything but the seed, a wrong
# `single_forward`. In float64, since rounding may decide between near ties. Here with every cache; what is refused is
# refused with a reason before the first forward.

# %%
exact = dllm.load("tiny-llada", dtype="float64")


def verdict(policy: Policy, cache: str) -> str:
    """What the contract says of a policy with a cache."""
    try:
        return "; ".join(violations(exact, policy, cache)) or "kept"
    except ValueError as refused:
        return f"refused: {refused}"


pd.DataFrame({"contract": {cache: verdict(Near(), cache) for cache in names("cache")}})

# %% [markdown]
# What a fault looks like: this one compares with the mean confidence of the whole batch. Alone, a row would get
# another result.


# %%
class Shared(Policy):
    """Commits what is more confident than the mean of the batch."""

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """Commit these, and the best of each row."""
        prediction = denoise()
        mean = prediction.confidence[window.masked].mean()
        best = top(prediction.confidence, 1, window.masked)
        return commit(window, prediction, (prediction.confidence >= mean) & window.masked | best)


violations(exact, Shared())

# %% [markdown]
# In a test file the same is `assert not violations(lm, Near())`. To make a policy part of the package, add a module,
# a YAML and a test ([CONTRIBUTING](../../CONTRIBUTING.md)); to use it by name from a folder of your own, give it
# a YAML there ([write a policy](../write-a-policy.md)).
