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
# # Train a filter
#
# [Learn2PD](https://arxiv.org/abs/2509.25188) replaces the threshold by a small learned filter: from the confidences
# of a block it predicts which of the predicted tokens are *final*, that is, equal to what one token per step would
# have decoded. It is trained on the model's own answers, without other data, and used by the policy `learn2pd`. `dllm
# train-filter` does this with 3,000 prompts; here it is in Python, with few.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

import dllm
from dllm.evaluation.word_problems import evaluate
from dllm.filters import Filter
from dllm.filters.training import Training, collect, fit, measure, split
from dllm.progress import progress_bar
from dllm.tasks.word_problems import problems

torch.set_num_threads(1)  # for a model this small, more threads are slower
lm = dllm.load("tiny-llada")
options = {"gen_length": 64, "block_length": 32}

# %% [markdown]
# ## Records
#
# `collect` decodes the prompts with the base policy, then replays them as greedily as possible: in each step it
# records the confidences of the block and which predictions are final, and commits exactly these. A record is one
# step of one block.

# %%
prompts = lm.tokenizer([problem.question for problem in problems(32, seed=3_000_001)]).input_ids
records = collect(lm, prompts, "vanilla", "none", seed=0, **options)
confidence, final = records.confidence[records.masked], records.final[records.masked]
print(f"{len(records.prompt)} records; {final.float().mean():.0%} of the predictions at masks are final")

# %% [markdown]
# What is not final has a low confidence, but so has much that is final. A filter sees the neighbours, too, and can
# distinguish some of these.

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
doubt = (1 - confidence).clamp(min=1e-7).log10()
axes.hist([doubt[final].numpy(), doubt[~final].numpy()], bins=28, label=["final", "not final"], density=True)
axes.set(xlabel="log10(1 - confidence)", ylabel="density")
axes.legend()
plt.show()

# %% [markdown]
# ## Training
#
# Prompts are held out for early stopping. 25 epochs take seconds; `dllm train-filter` allows 300.

# %%
how = Training(epochs=25, patience=8)
learn, held_out = split(records, how)
with progress_bar("training", how.epochs) as update:
    network, epoch = fit(
        learn, held_out, how, lambda number, loss: update(completed=number, note=f"held-out loss {loss:.4f}")
    )
quality, _ = measure(network, held_out)
pd.DataFrame(quality["thresholds"]).set_index("threshold").style.format("{:.1%}").format_index("{:g}")

# %% [markdown]
# Precision is the share of accepted predictions that are final, recall the share of final ones that are accepted: the
# threshold of the policy trades one for the other.
#
# ## Decode with it
#
# A filter without a card does not say which model it belongs to, hence `allow_mismatch`; those of `dllm train-filter`
# have one, and are refused for other models.

# %%
mine = Filter(network, None, "mine")
tests = problems(24, seed=1_000_001)
policies = {
    "one token per step": "vanilla",
    "threshold 0.999": dllm.samplers.Threshold(0.999),
    "the filter of this notebook": dllm.samplers.Learn2PD(mine, threshold=0.96, allow_mismatch=True),
    "the bundled filter": "learn2pd",
}
scores = {name: evaluate(lm, tests, policy, batch_size=24, **options) for name, policy in policies.items()}
table = pd.DataFrame(
    {name: [score.nfe, score.tpf, score.final, *score.interval] for name, score in scores.items()},
    index=["NFE", "TPF", "accuracy", "low", "high"],
).T
table.style.format("{:.1%}").format("{:.2f}", subset=["NFE", "TPF"])

# %% [markdown]
# `low` and `high` are the 95% interval of the accuracy: 24 problems distinguish little. The bundled filter was trained
# in the same way, on more prompts.

# %%
dllm.generate(lm, tests[0].question, policies["the filter of this notebook"], **options)

# %% [markdown]
# Saved, it can be named anywhere: `dllm generate sampler=learn2pd sampler.filter=mine.safetensors
# sampler.allow_mismatch=true`.

# %%
with tempfile.TemporaryDirectory() as folder:
    mine.save(Path(folder) / "mine.safetensors")
    again = dllm.samplers.Learn2PD(str(Path(folder) / "mine.safetensors"), allow_mismatch=True)
    print(dllm.generate(lm, tests[0].question, again, **options).texts[0])

# %% [markdown]
# For a published model: `dllm train-filter model=GSAI-ML/LLaDA-8B-Instruct data=questions.jsonl chat=true
# gen_length=256`, which stores records batch by batch and resumes ([training](../training.md)).
