"""Train a bundled model on the word problems: `python scripts/train_tiny.py arch=llada`.

Muon on the matrices, AdamW on the rest, linear decay, averaged weights; batches and masking are in
`tiny_data`. Run again to resume; a finished run is only evaluated again.
"""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from dllm import identity
from dllm.checks import number, seed
from dllm.files import write_whole
from dllm.models.loading import find_device
from dllm.scripts import app, training
from dllm.scripts.model_card import RECIPE, model_card, read_recipe, write_card
from dllm.scripts.tiny_data import BatchMaker, corrupt
from dllm.scripts.tiny_models import build_model
from dllm.scripts.training import Trainer, publish
from dllm.tasks import word_problems
from dllm.tasks.tokenizer import build_tokenizer


class OnWordProblems:
    """A model, the word problems it learns from, and the random state of a training; subclasses have a loss.

    Args:
        cfg: the options of the command.
    """

    def __init__(self, cfg: DictConfig) -> None:
        torch.manual_seed(cfg.seed)
        self.cfg = cfg
        self.tokenizer = build_tokenizer()
        self.batches = BatchMaker(cfg, self.tokenizer)
        self.rng = torch.Generator().manual_seed(cfg.seed)
        self.model = self._build().to(cfg.device)
        start = self._start()
        self.contents = {} if start is None else {"init": identity.of_path(start)}
        self.compute_loss = torch.compile(self._loss, dynamic=False) if cfg.compile else self._loss

    def _build(self) -> PreTrainedModel:
        raise NotImplementedError

    def _start(self) -> Path | None:
        """The folder of the initial weights."""
        return Path(self.cfg.init) if self.cfg.init else None

    def _loss(self, ids: Tensor, valid: Tensor, masked: Tensor, extra: Tensor) -> Tensor:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """The random states of the problems and the masks."""
        return {"rng": self.rng.get_state(), "problems": self.batches.rng.getstate()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a stored state."""
        self.rng.set_state(state["rng"])
        self.batches.rng.setstate(state["problems"])

    def save(self, folder: Path) -> None:
        """Write the model and its tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class WordProblems(OnWordProblems):
    """Training data and loss of the architectures."""

    def _build(self) -> PreTrainedModel:
        return build_model(self.cfg, self.tokenizer)

    def _loss(self, ids: Tensor, valid: Tensor, masked: Tensor, target: Tensor) -> Tensor:
        cfg, width = self.cfg, self.cfg.prompt_length
        positions = (valid.cumsum(-1) - 1).clamp(min=0)
        canvas, shift = ids[:, width:], 0 if cfg.arch == "llada" else 1
        if cfg.arch != "guide":
            ids = torch.cat((ids[:, :width], canvas.masked_fill(masked, self.tokenizer.mask_token_id)), dim=1)
        extra = {"use_cache": False} if cfg.arch == "guide" else {}
        with training.autocast(cfg.autocast, torch.device(cfg.device).type):
            logits = self.model(input_ids=ids, attention_mask=valid, position_ids=positions, **extra).logits
        logits = logits[:, width - shift : logits.shape[1] - shift].float()
        losses = F.cross_entropy(logits.transpose(1, 2), canvas, reduction="none")
        return ((losses * target).sum(-1) / target.sum(-1).clamp(min=1)).mean()

    def loss(self) -> Tensor:
        """The loss of the next batch."""
        cfg = self.cfg
        batch = self.batches()
        canvas = batch.ids[:, cfg.prompt_length :]
        if cfg.arch == "guide":
            masked = target = torch.ones_like(canvas, dtype=torch.bool)
        else:
            masked, target = corrupt(canvas, batch.answer_lengths, cfg.noise, self.tokenizer, self.rng)
        return self.compute_loss(*(t.to(cfg.device) for t in (batch.ids, batch.valid, masked, target)))


def main() -> None:
    """Entry point."""
    text = {"init": str | None, "publish": str | None, "autocast": str | None}
    app.run(train, "train_tiny", {**text, "threads": int | None})


def train(cfg: DictConfig) -> None:
    """Train for `steps` with checkpoints; then evaluate, write the model card and publish."""
    _check(cfg)
    logging.disable_progress_bar()  # transformers draws one for each small file
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    carry_out(cfg, trainer_of(cfg), RECIPE, cfg.arch, cfg.arch)


def carry_out(cfg: DictConfig, trainer: Trainer, recipe_file: str, doing: str, arch: str) -> None:
    """Resume or begin a training, and write the model, its card and what is published.

    Args:
        cfg: the options of the command.
        trainer: of the model.
        recipe_file: name of the training configuration in the folder of the model.
        doing: title of the progress bar.
        arch: of the card.
    """
    with training.folder(cfg, recipe_file):
        trainer.resume()
        if trainer.step < cfg.steps:
            write_whole(trainer.out / recipe_file, OmegaConf.to_yaml(cfg))
        training.run(trainer, doing)
        trainer.export()
        written = identity.stamps(trainer.out)
        recipe = OmegaConf.create(read_recipe(trainer.out / recipe_file, cfg) | {"arch": arch})
        card = model_card(trainer.out, recipe, cfg, trainer.seconds / 60)
        identity.check_unchanged(written)
        write_card(trainer.out / "README.md", card, recipe_file)
    if cfg.publish:
        publish(trainer.out, Path(cfg.publish), recipe_file, card)
    print(f"model and model card in {cfg.publish or cfg.out}")


def trainer_of(cfg: DictConfig) -> Trainer:
    """The training of an architecture, from its start."""
    words = WordProblems(cfg)
    return Trainer(cfg, words, training.muon_and_adamw(words.model, cfg.matrix_lr, cfg.rest_lr), RECIPE)


def check_data(cfg: DictConfig) -> None:
    """Reject bad values of the options of the problems."""
    word_problems.check_count("batch_size", cfg.batch_size)
    word_problems.check_count("eval_problems", cfg.eval_problems, least=0)
    number("prompt_length", cfg.prompt_length, "1 to 1000000", low=1, high=1_000_000, whole=True)
    seed("eval_seed", cfg.eval_seed)
    if len(cfg.step_weights) != 3 or not cfg.canvas_lengths:
        name = "canvas_lengths" if not cfg.canvas_lengths else "step_weights"
        raise ValueError(f"{name}={cfg[name]} is out of range; use three weights, and at least one length")
    for place, weight in enumerate(cfg.step_weights):
        number(f"step_weights[{place}]", weight, "a weight of 0 or more", low=0, high=1e6)
    for length, weight in cfg.canvas_lengths.items():
        number("canvas_lengths", length, "whole lengths of at least 1", low=1, high=1_000_000, whole=True)
        number(f"canvas_lengths.{length}", weight, "a weight of 0 or more", low=0, high=1e6)
    for name, weights in (("step_weights", cfg.step_weights), ("canvas_lengths", cfg.canvas_lengths.values())):
        if not sum(weights):
            raise ValueError(f"{name}={cfg[name]} has no weight above 0; give one")


def _check(cfg: DictConfig) -> None:
    check_data(cfg)
    training.check(cfg, ("matrix_lr", "rest_lr"))
    for name, value in cfg.noise.items():
        if name == "max_window":
            number(f"noise.{name}", value, "1 or more", low=1, whole=True)
        else:
            number(f"noise.{name}", value, "a share from 0 to 1", low=0, high=1)
    if cfg.arch not in ("guide", "llada", "dream"):
        raise ValueError(f"unknown arch={cfg.arch!r}; expected one of guide, llada, dream")
    find_device(cfg.device)
    training.check_folders(cfg, RECIPE)
    size = cfg.model
    for name, value in size.items():
        most = 1000 if name == "num_layers" else 1_000_000
        number(f"model.{name}", value, f"1 to {most}", low=1, high=most, whole=True)
    if size.hidden_size % (2 * size.num_heads) or size.num_heads % size.num_kv_heads:
        raise ValueError(
            f"model.num_heads={size.num_heads} is out of range; twice it must divide hidden_size={size.hidden_size}, "
            f"and num_kv_heads={size.num_kv_heads} must divide it"
        )
