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
# # Calibrate a policy for your model
#
# Which threshold is safe? *Learn then Test* ([arXiv 2110.01052](https://arxiv.org/abs/2110.01052)) answers with a
# guarantee: of a list of settings, from safe to fast, it certifies those which lose a right answer of one token per
# step on at most a share `loss` of all problems, except with probability `delta` over the draw of the problems.
#
# The numbers here are toys, so that the notebook takes seconds: 24 problems certify a loss of at most 10%, and only
# if no answer is lost. For `loss=0.01` and `delta=0.05`, the defaults of `dllm calibrate`, take **1,000 problems**:
# they allow 4 losses, and 299 without any are the least.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from IPython.display import SVG

import dllm
from dllm.calibration import Calibration
from dllm.evaluation.risk import fixed_sequence, losses_of
from dllm.tasks.word_problems import grade, problems

torch.set_num_threads(1)  # for a model this small, more threads are slower
lm = dllm.load("tiny-llada")

# %% [markdown]
# ## In Python, with a task of your own
#
# All it takes is the score of each answer, 0 or 1 (or anything between), under one token per step and under each
# setting. The loss of a problem is what is lost against one token per step; gains do not count.

# %%
tasks = problems(24, seed=2_000_001)


def scores(policy: dllm.samplers.base.Sampler) -> np.ndarray:
    """The score of each problem."""
    prompts = [task.question for task in tasks]
    out = dllm.generate(lm, prompts, policy, gen_length=64, block_length=32, batch_size=24)
    return np.array([float(grade(text, task).final) for text, task in zip(out.texts, tasks, strict=True)])


base = scores(dllm.samplers.Vanilla())
values = (0.9999, 0.999, 0.99, 0.95, 0.9, 0.8, 0.6)  # from safe to fast, chosen beforehand
tests = fixed_sequence(
    values, lambda value: losses_of(base, scores(dllm.samplers.Threshold(value))), limit=0.1, delta=0.1
)
pd.DataFrame([vars(test) for test in tests]).set_index("setting")

# %% [markdown]
# `bound` is the upper confidence bound on the loss, `p_value` that of the hypothesis that the loss exceeds the limit.
# Testing stops at the first setting that is not certified: only so does the guarantee hold for all of them without a
# correction. That a later one looks good by luck does not matter then.
#
# ## By the command, which writes a card
#
# `dllm calibrate` does the same for any policy with a knob and any task, resumes after an interruption, and writes a
# card that names the model by its weights. On a terminal: `dllm calibrate sampler=threshold 'values=[0.9999,0.99]'
# task.limit=24 loss=0.1 delta=0.1`.

# %%
folder = tempfile.TemporaryDirectory()
command = ["calibrate", "model=tiny-llada", "sampler=threshold", "values=[0.9999,0.99]", "threads=1"]
command += ["task.limit=24", "loss=0.1", "delta=0.1", f"out={folder.name}/calibrate"]
done = subprocess.run(
    [sys.executable, "-m", "dllm", *command], cwd=folder.name, capture_output=True, text=True, check=True
)
print(done.stdout.replace(folder.name, "outputs"))

# %%
file = Path(folder.name) / "calibrate" / "calibration.json"
card = Calibration.read(file)
print(f"{card.knob}={card.value} of {card.n} problems: loses at most {card.bound:.1%} (limit {card.loss:.0%})")
SVG(file.with_suffix(".svg").read_text(encoding="utf-8"))

# %% [markdown]
# ## Use it
#
# A model loaded with its card uses the certified setting wherever no sampler is given, and another model refuses the
# card. The guarantee is for problems of the same kind, with the same cache and lengths: others get a warning.

# %%
calibrated = dllm.load("tiny-llada", calibration=file)
dllm.generate(calibrated, problems(2, seed=5)[0].question, gen_length=64, block_length=32)

# %%
folder.cleanup()

# %% [markdown]
# For your model: `dllm calibrate model=GSAI-ML/LLaDA-8B-Instruct model.dtype=bfloat16 task=gsm8k task.limit=1000
# sampler=threshold cache=dual` ([evaluation](../evaluation.md) explains the card and has the values of the bundled
# models).
