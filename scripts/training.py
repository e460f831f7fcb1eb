"""What the commands that train share: checkpoints, averaged weights, the loop, its log and its checks.

The learning rates rise over `warmup` steps and fall linearly to 1% of the options. What is saved is an exponential
average of the weights.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn

from dllm.checks import Notice, first_line, number, out_of_memory, seed, threads
from dllm.evaluation.claim import claimed
from dllm.files import UNFINISHED, remove_unfinished, state, unfinished_in, write_whole
from dllm.progress import progress_bar, watched
from dllm.scripts import app, own
from dllm.scripts.model_card import check_recipe, identity_of, write_card
from dllm.stored import misfit, there

# Files of a published model; the others are for resuming.
PUBLISHED = """README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json
special_tokens_map.json added_tokens.json chat_template.jinja""".split()
_RATES = ("rate", "matrix_lr", "rest_lr")
STATE, LOG = "state.pt", "loss.csv"
# Optimizer state per parameter.
_KEPT = {"Muon": ("momentum_buffer",), "AdamW": ("step", "exp_avg", "exp_avg_sq")}
_DAMAGE = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, LookupError, TypeError, AttributeError)


class Objective(Protocol):
    """What is trained, and on what.

    Attributes:
        model: whose parameters that require gradients are trained.
        contents: a hash of what each option that names files stands for, by option.
    """

    model: nn.Module
    contents: dict[str, str]

    def loss(self) -> Tensor:
        """The loss of the next batch."""
        ...

    def state(self) -> dict[str, Any]:
        """What the next batches depend on, to store."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a stored state."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model with its current weights, so that it can be loaded."""
        ...


class Trainer:
    """The complete training state.

    Args:
        cfg: `out`, `steps`, `warmup`, `ema`, `checkpoint_every` and `log_every`.
        objective: what is trained.
        optimizers: of disjoint parameters, each with its learning rate.
        recipe: file name of the configuration in `out`.
    """

    def __init__(
        self, cfg: DictConfig, objective: Objective, optimizers: Sequence[torch.optim.Optimizer], recipe: str
    ) -> None:
        self.cfg, self.objective, self.optimizers, self.recipe = cfg, objective, optimizers, recipe
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        self.out = Path(cfg.out)
        self.parameters: list[Tensor] = [p for p in objective.model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0
        self.seconds = 0.0
        self.losses: list[Tensor] = []  # of the steps after the last line of the log

    def train_step(self) -> Tensor:
        """Train on one batch; return its loss."""
        cfg = self.cfg
        loss = self.objective.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        scale = min(1.0, (self.step + 1) / cfg.warmup) * max(0.01, 1 - self.step / cfg.steps)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            weight = max(1 - cfg.ema, 10 / (self.step + 10))
            torch._foreach_lerp_(self.average, self.parameters, weight)
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write the training checkpoint, and the averaged weights as a loadable model.

        Raises:
            ValueError: weights are NaN or infinite; the last checkpoint stays.
        """
        self._check_finite(_finite(*self.parameters, *self.average), "weights are")
        state = {
            "model": [p.detach().clone() for p in self.parameters], "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers], "step": self.step, "seconds": self.seconds,
            "losses": self.losses, "contents": self.objective.contents, "recipe": self._identity(),
            **self.objective.state(),
        }  # fmt: skip
        file = io.BytesIO()
        torch.save(state, file)
        write_whole(self.out / STATE, file.getvalue())
        self.export()

    def check_loss(self, loss: float) -> None:
        """Reject a loss that is NaN or infinite."""
        self._check_finite(math.isfinite(loss), "the loss is")

    def _check_finite(self, finite: bool, what: str) -> None:
        if not finite:
            rates = " and ".join(f"{name}={self.cfg[name]}" for name in _RATES if name in self.cfg)
            raise ValueError(f"{what} NaN or infinite after {self.step} steps with {rates}; use less, and another out")

    def export(self) -> None:
        """Write the averaged weights as a loadable model."""
        trained = [p.detach().clone() for p in self.parameters]
        self._assign(self.average)
        for left in self.out.iterdir():  # of a process that was killed
            if UNFINISHED.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
        folder = unfinished_in(self.out)
        try:
            folder.mkdir()
            self.objective.save(folder)
            for file in folder.iterdir():
                write_whole(self.out / file.name, file.read_bytes())
        except Exception as error:
            if not isinstance(error, SafetensorError) and type(error) is not Exception:  # as tokenizers raises
                raise
            raise OSError(f"{folder} cannot be written ({first_line(error)}); free disk space") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._assign(trained)

    def resume(self) -> None:
        """Resume from `out/state.pt` if it exists.

        Raises:
            ValueError: it is damaged, from another recipe, or of other contents.
        """
        state = read_state(self.out)
        check_recipe(self.out / self.recipe, self.cfg, state is not None)
        if state is None:
            return
        check_contents(self.cfg, self.objective.contents, state)
        if state.get("recipe", self._identity()) != self._identity():  # none in checkpoints of earlier versions
            raise ValueError(
                f"{self.out / STATE} is of another training than {self.recipe} beside it; put its own back, or remove "
                "it to train from scratch"
            )
        try:
            self._restore(state)
        except _DAMAGE as error:
            if out_of_memory(error):
                raise
            raise _damaged(self.out / STATE, error) from None

    def _identity(self) -> str:
        return sha256(json.dumps(_alike(identity_of(self.cfg)), sort_keys=True, default=str).encode()).hexdigest()

    def _restore(self, state: dict[str, Any]) -> None:
        shapes = [p.shape for p in self.parameters]
        if any([p.shape for p in state[name]] != shapes for name in ("model", "average")):
            raise TypeError("weights of other sizes")
        if not _finite(*state["model"], *state["average"]):
            raise TypeError("weights that are NaN or infinite")
        if misfit(state["step"], int) or not 0 < state["step"] <= self.cfg.steps or misfit(state["seconds"], float):
            raise TypeError("no number of steps and seconds")
        losses = state.get("losses", [])  # none in checkpoints of earlier versions
        if any(loss.shape != () for loss in losses):
            raise TypeError("no losses")
        if len(state["optimizers"]) != len(self.optimizers):
            raise TypeError("other optimizers")
        self._assign(state["model"])
        self.average = [p.to(own.device) for p, own in zip(state["average"], self.parameters, strict=True)]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            # Hyperparameters come from the recipe.
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
            for parameter in optimizer.param_groups[0]["params"]:
                values = optimizer.state[parameter]
                shapes = [values[name].shape for name in _KEPT[type(optimizer).__name__]]
                if any(shape not in (parameter.shape, ()) for shape in shapes):
                    raise TypeError("optimizers of other sizes")
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses = [loss.to(self.parameters[0].device) for loss in losses]
        try:
            self.objective.restore(state)
        except ValueError as error:
            raise TypeError(error) from None

    def _assign(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def _alike(value: Any) -> Any:
    """Options whose numbers are equal however they are written: 0 and 0.0."""
    if isinstance(value, dict):
        return {str(name): _alike(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_alike(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _finite(*tensors: Tensor) -> bool:
    return all(bool(each.isfinite().all()) for each in tensors)


def read_state(out: Path, mapped: bool = False) -> dict[str, Any] | None:
    """The training checkpoint in a folder; None if there is none.

    Args:
        out: the folder.
        mapped: map the tensors instead of reading them.

    Raises:
        ValueError: it is damaged.
    """
    path = out / STATE
    try:
        if not there(path):
            return None
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(state, dict) or misfit(state.get("contents", {}), dict[str, str]):
            raise TypeError("no hashes of contents")
    except _DAMAGE as error:
        if out_of_memory(error):
            raise
        raise _damaged(path, error) from None
    return state


def check_contents(
    cfg: DictConfig, now: Mapping[str, str], state: Mapping[str, Any], kept: Sequence[str] = (STATE,)
) -> None:
    """Reject a training checkpoint that was made from other contents under the same names.

    Those of earlier versions do not say what they were made from.

    Args:
        cfg: the options.
        now: as `Objective.contents`.
        state: the training checkpoint.
        kept: names in `out` of what was made from these contents.

    Raises:
        ValueError: contents differ.
    """
    before = state.get("contents", {})
    # Earlier versions knew no code of one's own.
    if names := [name for name in now if (before.get(name) or now[name]) != now[name]]:
        values = {name: OmegaConf.select(cfg, name) for name in names}
        named = " and ".join(
            name if isinstance(value, DictConfig) else f"{name}={value!r}" for name, value in values.items()
        )
        stale = " and ".join(str(Path(cfg.out) / name) for name in kept)
        raise ValueError(
            f"out={str(cfg.out)!r} was trained with other contents of {named}; give another out, or remove {stale} to "
            "train from scratch"
        )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({first_line(error)}); remove it to train from scratch")


def muon_and_adamw(model: nn.Module, matrix_lr: float, rest_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and (".layers." in n or ".blocks." in n)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=rest_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def publish(out: Path, folder: Path, recipe: str, card: str) -> None:
    """Copy a finished model, without the training checkpoint, and write its card."""
    own.check_training("publish", folder, PUBLISHED, recipe)
    with claimed(folder / recipe, f"publish={str(folder)!r}", "another folder"):
        write_card(folder / "README.md", card, recipe)  # first, as the folder is known by it
        for name in PUBLISHED:
            if (out / name).exists() and name != "README.md":
                write_whole(folder / name, (out / name).read_bytes())


def run(trainer: Trainer, what: str, check: Callable[[], object] = lambda: None) -> None:
    """Run the remaining steps, with a progress bar on a terminal or in a notebook, and log lines elsewhere.

    Args:
        trainer: the training.
        what: it does.
        check: called before each checkpoint; raises an error where what is trained was changed.
    """
    cfg, console = trainer.cfg, Console(stderr=True)
    bar = progress_bar(what, cfg.steps, trainer.step, console=console, show=watched(console))
    with _open_log(trainer) as file, bar as update:
        while trainer.step < cfg.steps:
            started = time.perf_counter()
            trainer.losses.append(trainer.train_step())
            trainer.seconds += time.perf_counter() - started
            update(completed=trainer.step)
            if trainer.step % cfg.log_every == 0:
                loss = torch.stack(trainer.losses).mean().item()
                trainer.check_loss(loss)
                trainer.losses.clear()
                update(note=f"loss {loss:.4f}")
                if not watched(console):
                    print(f"{trainer.step}/{cfg.steps}  loss {loss:.4f}", flush=True)
                file.write(f"{trainer.step},{loss:.5f},{trainer.seconds:.0f}\n")
                file.flush()
            if trainer.step % cfg.checkpoint_every == 0 or trainer.step == cfg.steps:
                check()
                trainer.save()
                if state(trainer.out / LOG) != state(file.fileno()):
                    told = f"{trainer.out / LOG} was removed or changed by another program; it lacks steps from now on"
                    warnings.warn(told, Notice, stacklevel=1)


def _open_log(trainer: Trainer) -> TextIO:
    """Open loss.csv, without lines after the resumed checkpoint."""
    path = trainer.out / LOG
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if there(path) else []
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged (it is not text); remove it to continue without it") from None
    kept = [f"{line}\n" for line in lines if (step := line.partition(",")[0]).isdecimal() and int(step) <= trainer.step]
    write_whole(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def check(cfg: DictConfig, rates: Sequence[str]) -> None:
    """Reject bad values of the options that all of these commands have.

    Args:
        cfg: the options.
        rates: names of the learning rates.
    """
    for name in ("steps", "warmup", "checkpoint_every", "log_every"):
        number(name, cfg[name], "1 or more", low=1, whole=True)
    seed("seed", cfg.seed)
    threads(cfg.threads)
    for name in rates:
        number(name, cfg[name], "a positive number", above=0, high=1e6)
    number("ema", cfg.ema, "0 or more and below 1", low=0, high=1 - 1e-9)
    if cfg.autocast not in (None, "bfloat16", "float16"):
        raise ValueError(f"unknown autocast={cfg.autocast!r}; expected one of bfloat16, float16, null")
    for name in ("out", "publish"):
        if cfg.get(name) is not None:
            app.check_writable(name, cfg[name], f"{cfg[name]}/README.md")


@contextmanager
def folder(cfg: DictConfig, recipe: str, published: Sequence[str] = PUBLISHED) -> Iterator[None]:
    """Lock the folder of a training, and look at what is in it again, since it may have come meanwhile.

    Args:
        cfg: the options.
        recipe: as in `check_folders`.
        published: likewise.

    Raises:
        ValueError: another training writes to it, or it has files of others.
    """
    with claimed(Path(cfg.out) / STATE, f"out={cfg.out!r}", "another folder"):
        check_folders(cfg, recipe, published)
        remove_unfinished(Path(cfg.out))
        yield


def check_folders(cfg: DictConfig, recipe: str, published: Sequence[str] = PUBLISHED) -> None:
    """Reject overwriting what is not of this command.

    Args:
        cfg: the options.
        recipe: file name of the configuration.
        published: file names of a finished model.
    """
    own.check_training("out", Path(cfg.out), (*published, STATE, LOG, recipe), recipe)
    if cfg.get("publish"):
        own.check_training("publish", Path(cfg.publish), published, recipe)


def autocast(precision: str | None, device_type: str) -> torch.autocast:
    """Compute in a precision; None for that of the weights."""
    dtype = getattr(torch, precision) if precision else torch.float32
    return torch.autocast(device_type, dtype=dtype, enabled=precision is not None)
