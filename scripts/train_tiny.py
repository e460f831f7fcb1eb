"""Train a bundled model on the word problems: `python scripts/train_tiny.py arch=llada`.

Muon on the matrices, AdamW on the rest, linear decay, averaged weights; batches and masking are in
`tiny_data`. Run again to resume; a finished run is only evaluated again.
"""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import io
import os
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn
from transformers.utils import logging

from dllm.checks import first_line, number, seed, threads
from dllm.evaluation.claim import Claim
from dllm.files import write_whole
from dllm.progress import progress_bar
from dllm.scripts import app, own
from dllm.scripts.model_card import RECIPE, check_recipe, model_card, read_recipe, write_card
from dllm.scripts.tiny_data import BatchMaker, corrupt
from dllm.scripts.tiny_models import build_model
from dllm.stored import misfit, there
from dllm.tasks import word_problems
from dllm.tasks.tokenizer import build_tokenizer

# Files of a published model; the others are for resuming.
PUBLISHED = """README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json
special_tokens_map.json added_tokens.json chat_template.jinja""".split()


# Optimizer state per parameter.
_KEPT = (("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq"))
_DAMAGE = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, LookupError, TypeError, AttributeError)


class Trainer:
    """The complete training state."""

    def __init__(self, cfg: DictConfig) -> None:
        torch.manual_seed(cfg.seed)
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.device_type = torch.device(cfg.device).type
        self.tokenizer = build_tokenizer()
        self.batches = BatchMaker(cfg, self.tokenizer)
        self.rng = torch.Generator().manual_seed(cfg.seed)
        self.model = build_model(cfg, self.tokenizer).to(cfg.device)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and (".layers." in n or ".blocks." in n)]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=cfg.matrix_lr, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=cfg.rest_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.step = 0
        self.seconds = 0.0
        self.compute_loss = torch.compile(self._loss, dynamic=False) if cfg.compile else self._loss

    def _loss(self, ids: Tensor, valid: Tensor, masked: Tensor, target: Tensor) -> Tensor:
        cfg, width = self.cfg, self.cfg.prompt_length
        positions = (valid.cumsum(-1) - 1).clamp(min=0)
        dtype = getattr(torch, cfg.autocast) if cfg.autocast else torch.float32
        canvas, shift = ids[:, width:], 0 if cfg.arch == "llada" else 1
        if cfg.arch != "guide":
            ids = torch.cat((ids[:, :width], canvas.masked_fill(masked, self.tokenizer.mask_token_id)), dim=1)
        extra = {"use_cache": False} if cfg.arch == "guide" else {}
        with torch.autocast(self.device_type, dtype=dtype, enabled=cfg.autocast is not None):
            logits = self.model(input_ids=ids, attention_mask=valid, position_ids=positions, **extra).logits
        logits = logits[:, width - shift : logits.shape[1] - shift].float()
        losses = F.cross_entropy(logits.transpose(1, 2), canvas, reduction="none")
        return ((losses * target).sum(-1) / target.sum(-1).clamp(min=1)).mean()

    def train_step(self) -> Tensor:
        """Train on one batch; return its loss."""
        cfg = self.cfg
        batch = self.batches()
        canvas = batch.ids[:, cfg.prompt_length :]
        if cfg.arch == "guide":
            masked = target = torch.ones_like(canvas, dtype=torch.bool)
        else:
            masked, target = corrupt(canvas, batch.answer_lengths, cfg.noise, self.tokenizer, self.rng)
        loss = self.compute_loss(*(t.to(cfg.device) for t in (batch.ids, batch.valid, masked, target)))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = min(1.0, (self.step + 1) / cfg.warmup) * max(0.01, 1 - self.step / cfg.steps)
        for optimizer, rate in zip(self.optimizers, (cfg.matrix_lr, cfg.rest_lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            weight = max(1 - cfg.ema, 10 / (self.step + 10))
            torch._foreach_lerp_(self.average, list(self.model.parameters()), weight)
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write the training checkpoint, and the averaged weights as a loadable model."""
        state = {
            "model": [p.detach().clone() for p in self.model.parameters()], "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers], "step": self.step, "seconds": self.seconds,
            "rng": self.rng.get_state(), "problems": self.batches.rng.getstate(),
        }  # fmt: skip
        file = io.BytesIO()
        torch.save(state, file)
        write_whole(self.out / "state.pt", file.getvalue())
        self.export()

    def export(self) -> None:
        """Write the averaged weights and the tokenizer."""
        trained = [p.detach().clone() for p in self.model.parameters()]
        self._assign(self.average)
        with TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            for file in Path(folder).iterdir():
                write_whole(self.out / file.name, file.read_bytes())
        self._assign(trained)

    def resume(self) -> None:
        """Resume from `out/state.pt` if it exists.

        Raises:
            ValueError: it is damaged, or from another recipe.
        """
        path, state = self.out / "state.pt", None
        try:
            if there(path):
                state = torch.load(path, map_location="cpu", weights_only=True)
            check_recipe(self.out, self.cfg, state is not None)
            if state is not None:
                self._restore(state)
        except _DAMAGE as error:
            raise ValueError(f"{path} is damaged ({first_line(error)}); remove it to train from scratch") from None

    def _restore(self, state: dict[str, Any]) -> None:
        shapes = [p.shape for p in self.model.parameters()]
        if any([p.shape for p in state[name]] != shapes for name in ("model", "average")):
            raise TypeError("weights of other sizes")
        if misfit(state["step"], int) or not 0 < state["step"] <= self.cfg.steps or misfit(state["seconds"], float):
            raise TypeError("no number of steps and seconds")
        if len(state["optimizers"]) != len(self.optimizers):
            raise TypeError("other optimizers")
        self._assign(state["model"])
        self.average = [p.to(self.cfg.device) for p in state["average"]]
        for optimizer, saved, kept in zip(self.optimizers, state["optimizers"], _KEPT, strict=True):
            # Hyperparameters come from the recipe.
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
            for parameter in optimizer.param_groups[0]["params"]:
                values = optimizer.state[parameter]
                shapes = [values[name].shape for name in kept]
                if any(shape not in (parameter.shape, ()) for shape in shapes):
                    raise TypeError("optimizers of other sizes")
        self.step, self.seconds = state["step"], state["seconds"]
        self.rng.set_state(state["rng"])
        try:
            self.batches.rng.setstate(state["problems"])
        except ValueError as error:
            raise TypeError(error) from None

    def _assign(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), values, strict=True):
                parameter.copy_(value)


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
    trainer = Trainer(cfg)
    with _claimed("out", cfg.out):
        trainer.resume()
        if trainer.step < cfg.steps:
            write_whole(trainer.out / RECIPE, OmegaConf.to_yaml(cfg))
        _run(trainer)
        trainer.export()
        card = model_card(trainer.out, OmegaConf.create(read_recipe(trainer.out, cfg)), cfg, trainer.seconds / 60)
        write_card(trainer.out / "README.md", card)
    if cfg.publish:
        _publish(trainer.out, Path(cfg.publish))
    print(f"model and model card in {cfg.publish or cfg.out}")


@contextmanager
def _claimed(option: str, folder: str) -> Iterator[None]:
    """Create and lock a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    claim = Claim(Path(os.path.realpath(folder)) / RECIPE, f"{option}={folder!r}", "another folder")
    claim.take()
    try:
        yield
    finally:
        claim.release()


def _publish(out: Path, folder: Path) -> None:
    """Copy a finished model, without the training checkpoint."""
    own.check_training("publish", folder, PUBLISHED)
    with _claimed("publish", str(folder)):
        for name in PUBLISHED:
            if (out / name).exists() and name != "README.md":
                write_whole(folder / name, (out / name).read_bytes())
        write_card(folder / "README.md", (out / "README.md").read_text(encoding="utf-8"))


def _run(trainer: Trainer) -> None:
    """Run the remaining steps, with a progress bar on a terminal and log lines elsewhere."""
    cfg, console, log = trainer.cfg, Console(stderr=True), []
    bar = progress_bar(cfg.arch, cfg.steps, trainer.step, console=console, show=console.is_terminal)
    with _open_log(trainer) as file, bar as update:
        while trainer.step < cfg.steps:
            started = time.perf_counter()
            log.append(trainer.train_step())
            trainer.seconds += time.perf_counter() - started
            update(completed=trainer.step)
            if trainer.step % cfg.log_every == 0:
                loss = torch.stack(log).mean().item()
                log.clear()
                update(note=f"loss {loss:.4f}")
                if not console.is_terminal:
                    print(f"{trainer.step}/{cfg.steps}  loss {loss:.4f}", flush=True)
                file.write(f"{trainer.step},{loss:.5f},{trainer.seconds:.0f}\n")
                file.flush()
            if trainer.step % cfg.checkpoint_every == 0 or trainer.step == cfg.steps:
                trainer.save()


def _open_log(trainer: Trainer) -> TextIO:
    """Open loss.csv, without lines after the resumed checkpoint."""
    path = trainer.out / "loss.csv"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if there(path) else []
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged (it is not text); remove it to continue without it") from None
    kept = [f"{line}\n" for line in lines if (step := line.partition(",")[0]).isdecimal() and int(step) <= trainer.step]
    write_whole(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _check_folders(cfg: DictConfig) -> None:
    """Reject overwriting another model."""
    own.check_training("out", Path(cfg.out), (*PUBLISHED, "state.pt", "loss.csv", RECIPE))
    if cfg.publish:
        own.check_training("publish", Path(cfg.publish), PUBLISHED)


def _check_shares(cfg: DictConfig) -> None:
    """Reject invalid shares and lengths."""
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
    for name, value in cfg.noise.items():
        if name == "max_window":
            number(f"noise.{name}", value, "1 or more", low=1, whole=True)
        else:
            number(f"noise.{name}", value, "a share from 0 to 1", low=0, high=1)


def _check(cfg: DictConfig) -> None:
    word_problems.check_count("batch_size", cfg.batch_size)
    word_problems.check_count("eval_problems", cfg.eval_problems, least=0)
    for name in ("steps", "warmup", "checkpoint_every", "log_every"):
        number(name, cfg[name], "1 or more", low=1, whole=True)
    number("prompt_length", cfg.prompt_length, "1 to 1000000", low=1, high=1_000_000, whole=True)
    for name in ("seed", "eval_seed"):
        seed(name, cfg[name])
    threads(cfg.threads)
    for name in ("matrix_lr", "rest_lr"):
        number(name, cfg[name], "a positive number", above=0, high=1e6)
    number("ema", cfg.ema, "0 or more and below 1", low=0, high=1 - 1e-9)
    _check_shares(cfg)
    if cfg.arch not in ("guide", "llada", "dream"):
        raise ValueError(f"unknown arch={cfg.arch!r}; expected one of guide, llada, dream")
    if cfg.autocast not in (None, "bfloat16", "float16"):
        raise ValueError(f"unknown autocast={cfg.autocast!r}; expected one of bfloat16, float16, null")
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device={cfg.device!r} is not available here; use cpu or a device torch sees") from None
    for name in ("out", "publish"):
        if cfg[name] is not None:
            app.check_writable(name, cfg[name], f"{cfg[name]}/README.md")
    _check_folders(cfg)
    size = cfg.model
    for name, value in size.items():
        most = 1000 if name == "num_layers" else 1_000_000
        number(f"model.{name}", value, f"1 to {most}", low=1, high=most, whole=True)
    if size.hidden_size % (2 * size.num_heads) or size.num_heads % size.num_kv_heads:
        raise ValueError(
            f"model.num_heads={size.num_heads} is out of range; twice it must divide hidden_size={size.hidden_size}, "
            f"and num_kv_heads={size.num_kv_heads} must divide it"
        )
