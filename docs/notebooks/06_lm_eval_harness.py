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
# # Evaluate with lm-evaluation-harness
#
# Any task of [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness) runs with any policy and
# any cache: generation, multiple choice and perplexity. The model class is `dllm`; it needs the extra `eval`. This
# notebook uses a task on local data, so that nothing is downloaded.

# %%
import json
import os
import tempfile
from pathlib import Path

folder = tempfile.TemporaryDirectory()
# Before the harness is imported; leave the first two out to use tasks of the hub.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ |= {
    "HF_DATASETS_CACHE": f"{folder.name}/cache",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}

import lm_eval
import pandas as pd
import torch
from lm_eval.tasks import TaskManager

from dllm.evaluation.lm_eval import DLLM
from dllm.tasks.word_problems import problems

torch.set_num_threads(1)  # for a model this small, more threads are slower

# %% [markdown]
# ## A task
#
# Tasks are YAML files; these two read a JSONL file. One generates and compares the number in the answer; the other
# compares the likelihoods of a right and a wrong solution.

# %%
rows = [
    {
        "question": problem.question,
        "answer": str(problem.answer),
        "choices": [problem.solution, problem.solution.replace(str(problem.answer), str(problem.answer + 1))],
    }
    for problem in problems(12, seed=1_000_001)
]
data = Path(folder.name) / "problems.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in rows))
source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
numbers = source | {
    "task": "numbers",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 64},
    "filter_list": [
        {
            "name": "last",
            "filter": [{"function": "regex", "regex_pattern": "answer is (\\d+)"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
solutions = source | {
    "task": "solutions",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": 0,
    "doc_to_choice": "{{choices}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
for task in (numbers, solutions):
    (Path(folder.name) / f"{task['task']}.yaml").write_text(json.dumps(task))  # YAML, too
manager = TaskManager(include_path=folder.name, include_defaults=False)

# %% [markdown]
# ## Policies are model arguments
#
# Sampler and cache are chosen by name, and their options have a prefix; options of decoding go by name. The harness
# scores the answers, and the model keeps a record of each, with its forwards. On a terminal this is
# `dllm lm-eval --model dllm --tasks numbers --include_path FOLDER --model_args
# pretrained=tiny-llada,sampler=threshold,sampler.threshold=0.999,cache=dual`.

# %%
common = {"pretrained": "tiny-llada", "block_length": 32, "batch_size": 12}
settings = {
    "4 tokens per step": {"sampler": "vanilla", "sampler.tokens_per_step": 4},
    "threshold 0.999": {"sampler": "threshold", "sampler.threshold": 0.999},
    "threshold 0.999, dual": {"sampler": "threshold", "sampler.threshold": 0.999, "cache": "dual"},
}


def evaluated(task: str, **arguments: object) -> tuple[dict[str, float], DLLM]:
    """The harness's results of a task, and the model with its records."""
    model = DLLM.create_from_arg_obj(common | arguments)
    found = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0)
    return found["results"][task], model


table = {}
for name, setting in settings.items():
    scores, model = evaluated("numbers", **setting)
    nfe = [record.nfe for record in model.runner.records()]
    table[name] = {"exact match": scores["exact_match,last"], "NFE": sum(nfe) / len(nfe)}
pd.DataFrame(table).T.style.format("{:.0%}").format("{:.2f}", subset=["NFE"])

# %% [markdown]
# ## Likelihoods
#
# A masked diffusion model has no left-to-right likelihood; LLaDA's Monte-Carlo bound masks the answer at random
# `estimate.samples` times. The policy plays no part in it.

# %%
scores, _ = evaluated("solutions", **{"estimate.samples": 8})
print(f"the right solution is more likely in {scores['acc,none']:.0%} of {len(rows)}")

# %%
folder.cleanup()

# %% [markdown]
# `dllm evaluate task=gsm8k sampler=threshold` runs the same tasks with the same results, and adds intervals, speed-ups
# over one token per step, traces, and resuming ([evaluation](../evaluation.md)).
