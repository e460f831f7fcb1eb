"""The model card of a bundled model: description, training, and accuracy, which is measured here."""

from __future__ import annotations

import os
import shlex
from hashlib import sha256
from itertools import count as numbers
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from transformers import Qwen2ForCausalLM
from yaml import YAMLError

import dllm
from dllm.checks import first_line
from dllm.evaluation.word_problems import Score, evaluate, evaluate_causal
from dllm.files import write_whole
from dllm.models.tokenizers import load_tokenizer
from dllm.resolve import merged
from dllm.samplers import Vanilla
from dllm.scripts.own import command_of
from dllm.stored import misfit, there
from dllm.tasks import word_problems

_KINDS = {
    "block": "A masked diffusion language model in the SDAR architecture (Qwen3, attention causal over blocks)",
    "llada": "A masked diffusion language model in the LLaDA architecture (bidirectional transformer)",
    "dream": "A masked diffusion language model in the Dream architecture (bidirectional Qwen2, shifted logits)",
    "guide": "A causal language model in the Qwen2 architecture, which can guide the bundled denoisers",
}
# Options that do not affect training.
NO_RECIPE = ("out", "publish", "init", "threads", "checkpoint_every", "log_every", "eval_problems", "eval_seed")
RECIPE = "train_tiny.yaml"  # training configuration, in the folder of the model
# Options that may change when resuming.
_NO_IDENTITY = {*NO_RECIPE, "device", "compile", "eval_sampler"} - {"init"}


def read_recipe(path: Path, cfg: DictConfig) -> dict[str, Any]:
    """The training configuration of a model, with all options of `cfg`.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found: Any = OmegaConf.create(path.read_text(encoding="utf-8"))
        fields: Any = OmegaConf.to_container(found, resolve=True)
        if wrong := misfit(fields, dict[str, Any]) or misfit(fields.get("threads"), int | None, "threads"):
            raise ValueError(wrong)
        if missing := [str(name) for name in cfg if name not in fields]:
            raise ValueError(f"it has no {missing[0]}")
        if "device" in cfg:
            torch.device(fields["device"])
    except (OSError, ValueError, TypeError, RuntimeError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); put it back, or give another out") from None
    return fields


def identity_of(cfg: DictConfig) -> dict[str, Any]:
    """The options that decide what is trained."""
    now: Any = OmegaConf.to_container(cfg, resolve=True)
    free = _NO_IDENTITY
    if "data" in now and now["data"] is None:  # the problems that are measured are left out of the prompts
        free = free - {"eval_problems", "eval_seed"}
    return {name: value for name, value in now.items() if name not in free}


def check_recipe(path: Path, cfg: DictConfig, needed: bool) -> None:
    """Reject the folder of another model.

    Args:
        path: the training configuration in it.
        cfg: the current configuration.
        needed: there is a training checkpoint to resume.

    Raises:
        ValueError: training options differ, or the recipe is missing.
    """
    folder = path.parent
    if not there(path, "put it back, or give another out"):
        if needed:
            raise ValueError(f"{path} is missing, which says how {folder} is trained; put it back, or give another out")
        return
    now, before = identity_of(cfg), read_recipe(path, cfg)
    names = [name for name in now if before[name] != now[name]]
    if names:
        then, this = (", ".join(f"{name}={each[name]}" for name in names) for each in (before, now))
        raise ValueError(
            f"out={str(folder)!r}: {path.name} says {then}, this run has {this}, so it holds the training of another "
            "model; give another folder"
        )


def write_card(path: Path, card: str, recipe: str = RECIPE) -> None:
    """Write a model card of the command of a recipe; an edited one is kept, and the new one is written next to it."""
    text = _marked(card, command_of(recipe))
    try:
        before = path.read_text(encoding="utf-8") if there(path) else text
    except UnicodeDecodeError:
        before = ""
    if before != text and not _is_as_made(before):
        names = (path.with_name(f"README.new{number or ''}.md") for number in numbers())
        kept, path = path, next(each for each in names if not os.path.lexists(each) or _is_made(each))
        print(f"{kept} was changed by hand and is kept; the new model card is {path}")
    write_whole(path, text)


def _marked(card: str, command: str) -> str:
    """A card with a checksum line to detect edits."""
    return f"{card}\n<!-- made by {command}, {sha256(card.encode()).hexdigest()[:16]} -->\n"


def _is_made(path: Path) -> bool:
    """Whether a file is a model card as it was written."""
    return path.is_file() and _is_as_made(path.read_text(encoding="utf-8", errors="replace"))


def _is_as_made(text: str) -> bool:
    card, _, last = text.rpartition("\n<!-- made by ")
    return _marked(card, last.partition(",")[0]) == text


def model_card(folder: Path, recipe: Any, cfg: DictConfig, minutes: float) -> str:
    """Evaluate a trained model and write its card.

    Args:
        folder: of the model.
        recipe: its training configuration.
        cfg: evaluation options: `eval_problems`, `eval_seed` and `device`.
        minutes: training time.

    Returns:
        Markdown with the YAML front matter that Hugging Face reads.
    """
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        parameters = sum(torch.Size(weights.get_slice(key).get_shape()).numel() for key in weights.keys())  # noqa: SIM118
    start = f", starting from the weights of {Path(recipe.init).name}" if recipe.init else ""
    parts = [
        *_front_matter(recipe.arch),
        f"# tiny-{recipe.arch}",
        f"{_KINDS[recipe.arch]}, {parameters:,} parameters. "
        f"{'It only solves' if recipe.arch == 'block' else 'It does one thing: solve'} the word problems that "
        "`dllm.tasks.word_problems` makes.",
        "## Data",
        "Problems of two or three additions and subtractions (and some of one) over 0 to 99, told in varied "
        "phrasings, each answered in one of three styles at random. They are made as training goes, "
        f"{recipe.batch_size:,} a step, from seed {recipe.seed}; a word-level tokenizer with single digits comes with "
        "the model. Problems to measure on come from seeds of 1,000,000 and above, which training never uses.",
        "## Training",
        f"`{_command(recipe)}`: {recipe.steps:,} steps of {recipe.batch_size:,} problems, "
        f"seed {recipe.seed}, {minutes:.0f} minutes on {_device(recipe)}{start}.",
        yaml_block({key: value for key, value in recipe.items() if key not in NO_RECIPE and value != "block"}),
        "## Accuracy",
        *_accuracy(folder, recipe.arch, cfg),
        "## Limits",
        "It knows the words, phrasings and number range of this task and nothing else: other text, larger numbers or "
        "longer chains give nonsense. It exists to compare ways of decoding on any machine.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(arch: str) -> list[str]:
    kind = "causal-lm" if arch == "guide" else "masked-diffusion"
    fields = {
        "license": "apache-2.0",
        "library_name": "transformers" if arch == "guide" else "dllm-samplers",
        "language": "en",
        "pipeline_tag": "text-generation",
        "tags": ["dllm", kind, {"guide": "qwen2", "block": "sdar"}.get(arch, arch), "word-problems"],
    }
    return ["---\n" + OmegaConf.to_yaml(fields) + "---"]


def _accuracy(folder: Path, arch: str, cfg: DictConfig) -> list[str]:
    if cfg.eval_problems == 0:
        return ["Not measured."]
    scores = measure(folder, arch, word_problems.problems(cfg.eval_problems, cfg.eval_seed), cfg.device)
    rows = [
        f"| {label} | {s.final:.1%} | {s.interval[0]:.1%} to {s.interval[1]:.1%} | {s.chain:.1%} |"
        for label, s in scores.items()
    ]
    head = "| decoding | right final answers | 95% interval | right final answer and whole chain |\n|---|---|---|---|\n"
    how = {"guide": "", "block": ", 64 positions, with cache=block"}.get(arch, ", 64 positions in blocks of 32")
    return [f"On {cfg.eval_problems} problems of seed {cfg.eval_seed}{how}:", head + "\n".join(rows)]


def measure(folder: Path, arch: str, problems: list[word_problems.Problem], device: str) -> dict[str, Score]:
    """Score a trained model: a denoiser at one and at four tokens a step, the guide greedily."""
    if arch == "guide":
        model: Any = Qwen2ForCausalLM.from_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        return {"greedy": evaluate_causal(model.to(device=device).eval(), tokenizer, problems)}
    lm, scores = dllm.load(folder, device=device), {}
    blocks: dict[str, Any] = {"cache": "block"} if arch == "block" else {"block_length": 32}
    console = Console(stderr=True)
    for count in track((1, 4), "measuring", console=console, disable=not console.is_terminal):
        label = f"vanilla, {count} token{'s' * (count > 1)} per step"
        scores[label] = evaluate(lm, problems, Vanilla(tokens_per_step=count), gen_length=64, batch_size=50, **blocks)
    return scores


def _device(recipe: Any) -> str:
    if torch.device(recipe.device).type == "cuda" and torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name(recipe.device)}"
    threads = recipe.threads or torch.get_num_threads()
    return f"{recipe.device} ({threads} thread{'s' * (threads > 1)})"


def yaml_block(fields: dict[Any, Any]) -> str:
    """A block of YAML in Markdown."""
    return f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(fields), resolve=True)}```"


def _command(recipe: Any) -> str:
    """The command that trains by this recipe: everything that differs from the defaults."""
    fields: Any = OmegaConf.to_container(recipe)
    adapted = recipe.arch == "block"
    defaults = merged("adapt" if adapted else "train_tiny")
    words = ["dllm adapt" if adapted else f"dllm train-tiny arch={recipe.arch}"]
    if recipe.init and recipe.init != defaults["init"]:
        words.append(f"init=outputs/{Path(recipe.init).name}")
    for key, value in fields.items():
        if key in ("arch", *NO_RECIPE) or value == defaults.get(key):
            continue
        if isinstance(value, dict):
            # Hydra merges dictionaries: missing keys must be set to 0.
            value = dict.fromkeys(defaults[key], 0) | value
        words.append(shlex.quote(f"{key}={_as_override(value)}"))
    return " ".join(words)


def _as_override(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_override(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_override, value)) + "]"
    return "null" if value is None else str(value)
