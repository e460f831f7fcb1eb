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
# # Watch a canvas fill
#
# A diffusion language model decodes a *canvas*: the prompt, followed by a region of [MASK] tokens. Each forward
# predicts every mask of the active block at once, and a policy chooses which of these predictions to commit. This
# notebook shows that step by step, on a bundled model of 0.9 million parameters. Beside the
# installation it needs Jupyter (`pip install jupyterlab jupytext`; jupytext opens this file as a notebook).

# %%
import torch
from IPython.display import display

import dllm
from dllm.evaluation.recording import Recording

torch.set_num_threads(1)  # for a model this small, more threads are slower
lm = dllm.load("tiny-llada")
question = "Tom has 23 apples. He buys 12. Then he gives away 8. How many apples does he have?"

# %% [markdown]
# `dllm.stream` yields a frame after every step. Displayed under one id, each replaces the one before: run the cell to
# see the canvas fill. Committed tokens are highlighted in the step that commits them; the pale ones are predicted and
# not committed yet; `∎` is end-of-text.

# %%
output = None
frames = []
for frame in dllm.stream(lm, question, sampler="tiny/threshold", gen_length=64, block_length=32):
    frames.append(frame)
    if output is None:
        output = display(frame, display_id=True)
    else:
        output.update(frame)

# %% [markdown]
# Early steps commit what does not depend on the rest; the digits of a result come once the operands are there.

# %%
for frame in frames[:3]:
    display(frame)

# %% [markdown]
# ## What a result shows
#
# A `Generation` colours each token by the forward that committed it (rest the pointer on a token for its number).
# *NFE* is the number of denoiser forwards, *TPF* the number of generated tokens, up to the end of the text, over NFE.
# One token per step is the baseline:

# %%
options = {"gen_length": 64, "block_length": 32}
dllm.generate(lm, question, sampler="vanilla", **options)

# %% [markdown]
# A confidence threshold commits every prediction above it, in far fewer forwards:

# %%
dllm.generate(lm, [question, "Mia has 48 pens. She uses 9. How many pens does she have?"], "tiny/threshold", **options)

# %% [markdown]
# ## Step by step
#
# A `Recording` collects the steps of a call; its trace is a table here, and a file for `dllm show` and `dllm report`.
# `wino` commits early and masks tokens again that lose the model's trust: these are red.

# %%
recording = Recording(lm)
out = dllm.generate(lm, question, "wino", callback=recording, **options)
recording.trace()

# %% [markdown]
# With a cache only a part of the canvas is computed in most steps (column *computed*); keys and values of the other
# positions are those of earlier steps. `dual` recomputes every position when a block begins, and the block alone
# after that.

# %%
recording = Recording(lm)
dllm.generate(lm, question, "tiny/threshold", "dual", callback=recording, gen_length=64, block_length=8)
recording.trace()

# %% [markdown]
# `recording.trace().save(Path("trace.safetensors"))` keeps it; `dllm show trace.safetensors` steps through it on a
# terminal, with confidences and drafts.
