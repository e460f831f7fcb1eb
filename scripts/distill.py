"""`dllm distill`: certainty-forcing distillation of a model on its own decodes."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import shlex
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import dllm
from dllm import identity
from dllm.api import prepare
from dllm.cache.base import Cache
from dllm.checks import number, seed
from dllm.decoding.prompts import encode
from dllm.decoding.request import Request
from dllm.distillation import Forcing, answer_logits, draw_masks, forcing_loss
from dllm.evaluation.word_problems import Score, evaluate
from dllm.files import expanded, is_folder, write_whole
from dllm.models.base import MaskedDiffusionModel
from dllm.models.loading import find_device
from dllm.progress import watched
from dllm.resolve import build, resolve
from dllm.samplers.base import Sampler
from dllm.scripts import app, training
from dllm.scripts.collecting import check_source, collected, contents_of, data_name, read_prompts
from dllm.scripts.model_card import NO_RECIPE, check_recipe, write_card, yaml_block
from dllm.scripts.training import Trainer
from dllm.stored import there
from dllm.tasks import word_problems

RECIPE, DECODES = "distill.yaml", "trajectories"
_LARGEST_BATCH = 100_000
ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors")
_KINDS = get_type_hints(dllm.Options) | {
    "data": str | None, "split": str | None, "column": str | None, "out": str | None, "rank": int | None,
    "alpha": float | None, "mask_ratio": float | None, "autocast": str | None, "threads": int | None,
}  # fmt: skip
# Options that the trajectories depend on.
_DECODING = """model sampler cache seed gen_length block_length temperature top_p top_k tempered_confidence stop_at_eos
eos_token_id eos_suppression batch_size""".split()
# Options that do not affect training.
_NO_RECIPE = (*NO_RECIPE, "eval_sampler")


class Distillation:
    """Trajectories and loss.

    Args:
        cfg: the options of the command.
        backbone: the model to train, in place; its parameters that require gradients are trained.
        tokenizer: written with a model; None for none.
        requests: of the prompts.
        completions: (N, G) their results, in the order of the requests.
        how: settings of the loss.
        contents: hashes of what the completions are made from, by option.
    """

    def __init__(
        self,
        cfg: DictConfig,
        backbone: MaskedDiffusionModel,
        tokenizer: PreTrainedTokenizerBase | None,
        requests: list[Request],
        completions: Tensor,
        how: Forcing,
        contents: dict[str, str],
    ) -> None:
        self.cfg, self.backbone, self.tokenizer, self.how = cfg, backbone, tokenizer, how
        self.contents = contents
        self.rng = torch.Generator().manual_seed(cfg.seed)
        starts = torch.tensor([len(request.tokens) - completions.shape[1] for request in requests])
        self.width = max(1, int(starts.max()))  # shifted logits are read a column earlier
        eos = requests[0].eos_token_ids
        column = torch.arange(self.width + completions.shape[1])
        self.valid = (column >= self.width - starts[:, None]).long()
        self.ids = torch.full(self.valid.shape, eos[0])
        for row, request in enumerate(requests):
            prompt = torch.as_tensor(request.tokens)[: starts[row]]
            self.ids[row, self.width - len(prompt) : self.width] = prompt
        self.ids[:, self.width :] = completions
        generated = torch.arange(completions.shape[1]).expand_as(completions)
        length = requests[0].blocks or completions.shape[1]
        self.blocks = (generated + starts[:, None] * requests[0].from_start) // length
        ended = torch.isin(completions, torch.tensor(eos)) & cfg.stop_at_eos
        self.ends = torch.where(ended, generated, completions.shape[1] - 1).amin(-1)
        self.pattern = backbone.pattern_of(cfg.block_length if isinstance(cfg.block_length, int) else None)
        self.model: nn.Module = backbone
        if cfg.rank is not None:
            self.model = _with_lora(backbone, cfg)

    def loss(self) -> Tensor:
        """The loss of the next batch."""
        rows = torch.randint(len(self.ids), (self.cfg.train_batch_size,), generator=self.rng)
        ids, valid = self.ids[rows].repeat(2, 1), self.valid[rows].repeat(2, 1)
        masked, targets = draw_masks(self.blocks[rows], self.ends[rows], self.how.mask_ratio, self.rng)
        device, tokens = self.backbone.device, ids[:, self.width :]
        noisy = torch.cat((ids[:, : self.width], tokens.masked_fill(masked, self.backbone.mask_token_id)), dim=1)
        with training.autocast(self.cfg.autocast, device.type):
            logits = answer_logits(self.backbone, noisy.to(device), valid.to(device), self.width, self.pattern)
        cross, entropy = forcing_loss(logits, targets.to(device), tokens.to(device), self.how)
        return cross + self.how.weight * entropy

    def state(self) -> dict[str, Any]:
        """The random state of the batches and the masks."""
        return {"rng": self.rng.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a stored state."""
        self.rng.set_state(state["rng"])

    def save(self, folder: Path) -> None:
        """Write the adapter, or the model and its tokenizer."""
        model: Any = self.model
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            return
        model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would look for the base on the hub
        (folder / "README.md").unlink()  # a template


def _with_lora(backbone: MaskedDiffusionModel, cfg: DictConfig) -> nn.Module:
    """Add a LoRA to every linear layer of the blocks."""
    try:
        import peft  # slow import, only needed here
    except ImportError:
        raise ValueError(f"rank={cfg.rank} needs peft, which is not installed; install it, or use rank=null") from None
    torch.manual_seed(cfg.seed)
    config = peft.LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha or cfg.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings(action="ignore"):  # peft calls what transformers renames
        model: Any = peft.get_peft_model(backbone, config)
    config.target_modules = sorted(config.target_modules or ())  # a set, whose order differs between processes
    # A name that holds elsewhere, where the model is no folder of this machine.
    path = expanded(cfg.model.path)
    config.base_model_name_or_path = str(path.resolve() if is_folder(path) else cfg.model.path)
    config.revision = cfg.model.revision
    trained: nn.Module = model
    return trained


def main() -> None:
    """Entry point."""
    app.run(distill, "distill", _KINDS)


def distill(cfg: DictConfig) -> None:
    """Collect trajectories, train on them, measure the result and write it with its card."""
    cfg.out = cfg.out or f"outputs/distill/{Path(cfg.model.path).name}"
    how = _check(cfg)
    logging.disable_progress_bar()  # transformers draws one for each small file
    made = app.build_both(cfg)
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    options = {name: fields[name] for name in dllm.Options.__dataclass_fields__ if name in fields}
    dllm.Options(**options)  # reject bad values before the model is loaded
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    prompts = _prompts(cfg)
    lm = _load(fields["model"])
    ids = encode(prompts, lm.tokenizer)
    requests, _ = prepare(lm, ids, made.sampler, made.cache, dllm.Options(**options))
    with training.folder(cfg, RECIPE, _files(cfg)):
        out = Path(cfg.out)
        state, contents = training.read_state(out, mapped=True), contents_of(lm, ids, made)
        check_recipe(out / RECIPE, cfg, state is not None)
        if state is not None:
            training.check_contents(cfg, contents, state, (training.STATE, DECODES))
        if not there(out / RECIPE):
            write_whole(out / RECIPE, OmegaConf.to_yaml(cfg))
        completions = _collect(lm, ids, made, options, fields)
        trained = Distillation(cfg, lm.backbone, lm.tokenizer, requests, completions, how, contents)
        trainer = trainer_of(cfg, trained)
        trainer.resume()
        training.run(trainer, "distilling", partial(identity.check_weights, lm))
        trainer.export()
        written = identity.stamps(out)
        rows = _measure(cfg, options, contents["model.path"])
        identity.check_unchanged(written)
        write_card(out / "README.md", _card(cfg, trainer, rows, len(ids)), RECIPE)
    for row in rows:
        print(row)
    print(f"{'model' if cfg.rank is None else 'adapter'} and its card in {cfg.out}")


def _files(cfg: DictConfig) -> Sequence[str]:
    """Names of what is written, beside the training checkpoint."""
    return *(training.PUBLISHED if cfg.rank is None else ADAPTER), DECODES


def _load(model: dict[str, Any]) -> dllm.LanguageModel:
    """Load the model to train."""
    device = find_device(model["device"], "model.device")
    # Packed or joined weights, as on a GPU, cannot be trained.
    lm: dllm.LanguageModel = app.load_model(model | {"device": "cpu", "pack": False})
    if lm.backbone.uniform:
        raise ValueError(f"model={model['path']!r} has no [MASK], which distilling needs; give a model that has")
    kind = "an adapter" if lm.adapter else "quantised" if getattr(lm.backbone, "hf_quantizer", None) else None
    if kind is not None:
        raise ValueError(f"model={model['path']!r} is {kind}, which cannot be trained; give a complete model")
    torch.nn.Module.to(lm.backbone, device)
    return lm


def trainer_of(cfg: DictConfig, distillation: Distillation) -> Trainer:
    """The training, from its start."""
    trained = [p for p in distillation.model.parameters() if p.requires_grad]
    return Trainer(cfg, distillation, [torch.optim.AdamW(trained, lr=cfg.rate, weight_decay=0.01)], RECIPE)


def _prompts(cfg: DictConfig) -> list[Any]:
    """The prompts, without word problems that are measured."""
    prompts = read_prompts(cfg)
    if cfg.data is None:
        held_out = {problem.question for problem in word_problems.problems(cfg.eval_problems, cfg.eval_seed)}
        prompts = [each for each in prompts if (each if isinstance(each, str) else each[-1]["content"]) not in held_out]
    if not prompts:
        raise ValueError(f"data={cfg.data!r} has no prompts; give more")
    return prompts


def _collect(
    lm: dllm.LanguageModel,
    ids: list[list[int]],
    reads: app.Built,
    options: dict[str, Any],
    fields: Mapping[str, Any],
) -> Tensor:
    """(N, G) results of all prompts."""
    size = options["gen_length"]

    def make(batch: range) -> dict[str, Tensor]:
        seeded = options | {"seed": options["seed"] + batch.start, "batch_size": len(batch)}
        result = dllm.generate(lm, ids[batch.start : batch.stop], reads.sampler, reads.cache, **seeded)
        if error := next(filter(None, result.errors), None):
            raise ValueError(f"a prompt has no answer: {error}")
        if result.completions.shape[1] != size:
            raise ValueError(f"gen_length={size} is changed by sampler={fields['sampler']['_target_']!r}; use another")
        return {"completions": result.completions.cpu().contiguous()}

    def stored(file: Path, batch: range) -> dict[str, Tensor] | None:
        if not there(file):
            return None
        try:
            found = load_file(file)
            tokens = found["completions"]
        except (SafetensorError, OSError, ValueError, KeyError):
            return None
        known = tokens.dtype == torch.int64 and bool(((tokens >= 0) & (tokens < lm.backbone.config.vocab_size)).all())
        return found if known and tokens.shape == (len(batch), size) else None

    recipe = {name: fields[name] for name in _DECODING}
    folder, state = (Path(fields["out"]) / name for name in (DECODES, training.STATE))
    fix = f"remove that folder and {state}" if state.exists() else "remove that folder"
    parts = collected(lm, ids, reads, recipe, folder, stored, make, fix)
    return torch.cat([part["completions"] for part in parts])


def _measure(cfg: DictConfig, options: dict[str, Any], trained: str) -> list[str]:
    """Lines of a table: the model before and after, by `eval_sampler`.

    Raises:
        OSError: the model is not the one that was trained any more.
    """
    if cfg.data is not None or cfg.eval_problems == 0:
        return []
    problems = word_problems.problems(cfg.eval_problems, cfg.eval_seed)
    sampler, cache = resolve("sampler", cfg.eval_sampler, Sampler, "eval_sampler"), build("cache", cfg.cache, Cache)
    model: Any = OmegaConf.to_container(cfg.model)
    after = {"path": cfg.out} if cfg.rank is None else {"adapter": cfg.out}
    rows = ["| model | right final answers | 95% interval | NFE |", "|---|---|---|---|"]
    for name, loaded in (("before", model), ("after", model | after)):
        lm = app.load_model(loaded)
        if name == "before" and " ".join(identity.model(lm).values()) != trained:
            raise OSError(f"model={cfg.model.path!r} was changed by another program during this run; put it back")
        shown = watched(Console(stderr=True))
        score: Score = evaluate(lm, problems, sampler, cache, **options | {"progress": shown})
        low, high = score.interval
        rows.append(f"| {name} | {score.final:.1%} | {low:.1%} to {high:.1%} | {score.nfe:.2f} |")
    return rows


def _card(cfg: DictConfig, trainer: Trainer, rows: list[str], prompts: int) -> str:
    recipe: Any = OmegaConf.to_container(cfg, resolve=True)
    kind = "A model" if cfg.rank is None else f"A LoRA of rank {cfg.rank} for {cfg.model.path}"
    use = f"model={cfg.out}" if cfg.rank is None else f"model={cfg.model.path} model.adapter={cfg.out}"
    measured = "Not measured."
    if rows:
        measured = f"On {cfg.eval_problems} word problems of seed {cfg.eval_seed}, with {cfg.eval_sampler}:\n\n"
        measured += "\n".join(rows)
    parts = [
        f"# {Path(cfg.out).name}",
        f"{kind}, distilled from {cfg.model.path} to be certain of more tokens at once (certainty-forcing "
        f"distillation, dParallel, arXiv 2509.26488). Use it with `dllm generate {use}`.",
        "## Training",
        f"`{_command(cfg)}`: {cfg.steps:,} steps of {cfg.train_batch_size} prompts, out of "
        f"{prompts:,} ({data_name(cfg)}) with the results of {Path(cfg.model.path).name} itself, "
        f"{trainer.seconds / 60:.0f} minutes.",
        yaml_block({name: value for name, value in recipe.items() if name not in _NO_RECIPE}),
        "## Accuracy",
        measured,
    ]
    return "\n\n".join(parts) + "\n"


def _command(cfg: DictConfig) -> str:
    """The command that makes the same, as it was given."""
    words = ["dllm", "distill"]
    for name, each in app.given().items():
        value = each.partition("=")[2]
        if name == "model.path":  # of a model that has no name
            words.append(f"model={cfg.model.path}")
        elif name not in _NO_RECIPE and (name, value) != ("model", "custom"):
            words.append(f"{name}={cfg[name]}" if isinstance(cfg.get(name), str) else each)
    return shlex.join(words)


def _check(cfg: DictConfig) -> Forcing:
    check_source(cfg)
    word_problems.check_count("eval_problems", cfg.eval_problems, least=0)
    training.check(cfg, ("rate",))
    seed("eval_seed", cfg.eval_seed)
    number("train_batch_size", cfg.train_batch_size, f"1 to {_LARGEST_BATCH}", low=1, high=_LARGEST_BATCH, whole=True)
    if cfg.rank is not None:
        number("rank", cfg.rank, "a whole number from 1 to 65536, or null", low=1, high=65536, whole=True)
    elif cfg.alpha is not None:
        raise ValueError(f"alpha={cfg.alpha} has no effect with rank=null; leave it out")
    if cfg.alpha is not None:
        number("alpha", cfg.alpha, "a number above 0, or null", above=0, high=1e6)
    if cfg.gen_length == "auto":
        raise ValueError("gen_length=auto is not supported; give the number of positions to generate")
    for name, fix in (("adapter", "merge it into the model first"), ("device_map", "use model.device")):
        if cfg.model[name] is not None:
            raise ValueError(f"model.{name}={cfg.model[name]!r} is not supported in training; {fix}")
    resolve("sampler", cfg.eval_sampler, Sampler, "eval_sampler")
    training.check_folders(cfg, RECIPE, _files(cfg))
    return Forcing(cfg.mask_ratio, cfg.entropy_temperature, cfg.entropy_weight)
