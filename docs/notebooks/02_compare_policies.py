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
# # Compare policies on your own prompts
#
# Which policy, and with which options, depends on the model and on the text. This notebook decodes the same prompts
# with several policies and reports what each costs (NFE, TPF) and keeps: *accuracy*, where answers can be graded, and
# *agreement* with one token per step, where they cannot. Put your model and your prompts into the second cell. The
# chart needs the extra `plot`.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch

import dllm
from dllm.evaluation.metrics import wilson
from dllm.tasks.word_problems import grade, problems

torch.set_num_threads(1)  # for a model this small, more threads are slower

# %% [markdown]
# 16 problems keep the notebook quick; their intervals are wide. `correct` may be any function of an answer's text and
# its number; leave it out where there is nothing to grade.

# %%
lm = dllm.load("tiny-llada")
tasks = problems(16, seed=1_000_001)
prompts = [task.question for task in tasks]
options = {"gen_length": 64, "block_length": 32, "batch_size": 40}


def correct(text: str, number: int) -> bool:
    """Whether an answer is right."""
    return grade(text, tasks[number]).final


# %% [markdown]
# A policy is a name, with the options of its YAML, or an object with options of your choice.

# %%
policies = {
    "one token per step": "vanilla",
    "2 tokens per step": dllm.samplers.Vanilla(tokens_per_step=2),
    "4 tokens per step": dllm.samplers.Vanilla(tokens_per_step=4),
    "threshold 0.999": dllm.samplers.Threshold(0.999),
    "threshold 0.9": dllm.samplers.Threshold(0.9),
    "localleap": "tiny/localleap",
    "learn2pd": "learn2pd",
    "wino": "tiny/wino",
}
results = {name: dllm.generate(lm, prompts, policy, **options) for name, policy in policies.items()}

# %%
base = results["one token per step"]


def summary(result: dllm.Generation) -> dict[str, float]:
    """Cost and quality, with the 95% Wilson interval of the accuracy."""
    right = sum(correct(text, number) for number, text in enumerate(result.texts))
    low, high = wilson(right, len(prompts))
    same = sum(text == other for text, other in zip(result.texts, base.texts, strict=True))
    return {
        "NFE": result.nfe.double().mean().item(), "TPF": result.stats.tpf, "accuracy": right / len(prompts),
        "low": low, "high": high, "agreement": same / len(prompts),
    }  # fmt: skip


table = pd.DataFrame({name: summary(result) for name, result in results.items()}).T
table.style.format("{:.1%}").format("{:.2f}", subset=["NFE", "TPF"])

# %% [markdown]
# Agreement asks for the same text, and is stricter than accuracy: these problems have several correct answers. The
# chart has accuracy against NFE; up and to the left is better, and this many prompts do not distinguish what lies
# within the other's interval.

# %%
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for name, row in table.iterrows():
    error = [[row.accuracy - row.low], [row.high - row.accuracy]]
    axes.errorbar(row.NFE, row.accuracy, yerr=error, fmt="o", capsize=3, label=name)
axes.set(xlabel="NFE per prompt", ylabel="accuracy", xscale="log")
axes.grid(alpha=0.3)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# Where policies disagree is worth a look. The first answer that `threshold 0.9` gets wrong, if there is one:

# %%
fast = results["threshold 0.9"]
wrong = [number for number, text in enumerate(fast.texts) if not correct(text, number)]
dllm.generate(lm, prompts[wrong[0]], dllm.samplers.Threshold(0.9), **options) if wrong else "none"

# %% [markdown]
# The same with resumable runs, a report with charts and a trace player, and all policies at once, is `dllm evaluate
# sweep=policies` and `dllm report` ([evaluation](../evaluation.md)). Which option value is safe, with a guarantee, is
# [the notebook on calibration](05_calibrate.py).
