"""What a denoising step costs beside the forward pass that it needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dllm.backbones import LLaDAConfig, LLaDAModelLM, MaskedDiffusionModel
from dllm.backbones.transformer import FeatureStore
from dllm.loading import LanguageModel
from dllm.plan import Options, Plan

# Shapes of random models: width, layers, heads, width of the feed-forward part, vocabulary.
PRESETS = {
    "tiny": (128, 4, 4, 384, 1024),
    "100m": (768, 12, 12, 2048, 16384),
    "llada-8b": (4096, 32, 32, 12288, 126464),
}


def random_model(preset: str, max_length: int, device: str | torch.device, dtype: torch.dtype) -> LanguageModel:
    """A LLaDA with random weights in one of the `PRESETS`.

    Raises:
        ValueError: no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"model='random:{preset}' is unknown; use one of {', '.join(f'random:{p}' for p in PRESETS)}")
    width, layers, heads, inner, vocabulary = PRESETS[preset]
    config = LLaDAConfig(
        vocab_size=vocabulary,
        d_model=width,
        n_heads=heads,
        n_layers=layers,
        mlp_hidden_size=inner,
        max_sequence_length=max_length,
        mask_token_id=vocabulary - 1,
        eos_token_id=vocabulary - 2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        backbone = LLaDAModelLM(config).eval()
    backbone.to(dtype)
    return LanguageModel(backbone, None, f"random:{preset}")


@dataclass(frozen=True)
class Call:
    """The shape of one call of the backbone.

    Attributes:
        sequences: A.
        columns: C, computed in each.
        selected: slots that are projected to the vocabulary.
        reuses: keys and values of other columns are attended to.
    """

    sequences: int
    columns: int
    selected: int
    reuses: bool


@dataclass(frozen=True)
class Timing:
    """One denoising step.

    Attributes:
        seconds: of the whole step: the plan, the forward, the choice, the edit.
        bare: of the backbone alone, called for as many columns and projected positions, while all columns
            are attended to.
        alone: of the same, attending to the computed columns only.
        columns: computed, over all rows.
        committed: tokens, over all rows.
        refreshed: whether some row was computed anew.
        store_bytes: of the keys and values kept.
    """

    seconds: float
    bare: float
    alone: float
    columns: int
    committed: int
    refreshed: bool
    store_bytes: int


@dataclass(frozen=True)
class Cost:
    """What the steps of one setting cost.

    Attributes:
        steps: how many were timed.
        columns: mean columns computed per step and row.
        step: mean seconds.
        tokens_per_second: committed over the sum of the steps.
        to_bare: median of step over bare, of the steps that reuse something; of all where none does.
        to_alone: the same over alone.
        refresh_to_bare: median of step over bare, of the steps that compute some row anew; None without any.
        spread: of `to_bare`, the difference of its quartiles.
        store_bytes: of the keys and values kept.
    """

    steps: int
    columns: float
    step: float
    tokens_per_second: float
    to_bare: float
    to_alone: float
    refresh_to_bare: float | None
    spread: float
    store_bytes: int


class Bench:
    """Times settings on one model, in turns: a step of each, and behind it the forward pass it needed.

    Args:
        lm: the model; prompts are random.
        canvas: columns.
        generated: how many of them are generated, at the end.
        batch: rows.
        block_length: columns decoded at a time; None for all.

    Raises:
        ValueError: the canvas is longer than the model's context.
    """

    def __init__(self, lm: LanguageModel, canvas: int, generated: int, batch: int, block_length: int | None) -> None:
        self.lm, self.canvas, self.batch = lm, canvas, batch
        self.options = Options(
            gen_length=generated, block_length=block_length, batch_size=batch, stop_at_eos=False, seed=0
        )
        if canvas > lm.backbone.max_length:
            raise ValueError(
                f"canvas={canvas} is longer than the model's context of {lm.backbone.max_length}; use less"
            )
        special = {lm.backbone.mask_token_id, *lm.backbone.eos_token_ids}
        words = torch.tensor([token for token in range(lm.backbone.config.vocab_size) if token not in special])
        generator = torch.Generator().manual_seed(0)
        self.prompts = words[torch.randint(len(words), (batch, canvas - generated), generator=generator)].tolist()

    def run(
        self, settings: Mapping[str, tuple[Any, Any]], steps: int, progress: Callable[[], object] = lambda: None
    ) -> dict[str, Cost]:
        """Time up to `steps` steps of each setting, a sampler and a cache, after a few to warm up."""
        timings: dict[str, list[Timing]] = {label: [] for label in settings}
        for warm, count in ((False, 3), (True, steps)):
            running = {label: self._timed(*setting) for label, setting in settings.items()}
            for _ in range(count):
                for label, iterator in running.items():
                    timing = next(iterator, None)
                    if timing is not None and warm:
                        timings[label].append(timing)
                    progress()
        return {label: self._cost(each) for label, each in timings.items()}

    @torch.inference_mode()
    def _timed(self, sampler: Any, cache: Any) -> Iterator[Timing]:
        plan = Plan(self.lm, self.prompts, sampler, cache, self.options, infill=False)
        steps, columns, refreshes = plan.steps(), 0, 0
        while True:
            with _watching(self.lm.backbone) as calls:
                started = self._now()
                found = next(steps, None)
                seconds = self._now() - started
            if found is None:
                return
            step, denoiser = found[1], found[1].denoiser
            computed, columns = int(denoiser.computed.sum()) - columns, int(denoiser.computed.sum())
            refreshed, refreshes = int(denoiser.refreshes.sum()) > refreshes, int(denoiser.refreshes.sum())
            shapes = [_partial(call, computed) if features else call for call, features in calls]
            bare, alone = (sum(self._bare(call, attend) for call in shapes) for attend in (True, False))
            committed = int(step.change.committed.sum())
            kept = getattr(getattr(denoiser.cache, "store", None), "nbytes", 0)
            yield Timing(seconds, bare, alone, computed, committed, refreshed, kept)

    def _bare(self, call: Call, attend: bool) -> float:
        """Seconds of the backbone alone, on made-up tokens."""
        backbone, device = self.lm.backbone, self.lm.device
        tokens = torch.zeros((call.sequences, call.columns), dtype=torch.long, device=device)
        positions = torch.arange(call.columns, device=device).expand_as(tokens)
        store = Given(backbone, call.sequences, self.canvas) if attend and call.reuses else None
        select = torch.arange(call.selected, device=device) % tokens.numel()
        started = self._now()
        backbone(tokens, None, positions, store, select)
        return self._now() - started

    def _cost(self, timings: Sequence[Timing]) -> Cost:
        reusing = [each for each in timings if not each.refreshed] or timings
        ratios = [each.seconds / each.bare for each in reusing]
        refreshing = [each.seconds / each.bare for each in timings if each.refreshed]
        quartiles = quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        total = sum(each.seconds for each in timings)
        return Cost(
            steps=len(timings),
            columns=sum(each.columns for each in timings) / len(timings) / self.batch,
            step=total / len(timings),
            tokens_per_second=sum(each.committed for each in timings) / total,
            to_bare=median(ratios),
            to_alone=median(each.seconds / each.alone for each in reusing),
            refresh_to_bare=median(refreshing) if refreshing else None,
            spread=quartiles[2] - quartiles[0],
            store_bytes=timings[0].store_bytes,
        )

    def _now(self) -> float:
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)
        return time.perf_counter()


class Given:
    """Keys and values of all columns, made up beforehand: a store that costs nothing."""

    def __init__(self, backbone: MaskedDiffusionModel, sequences: int, columns: int) -> None:
        _, heads, size = backbone.kv_shape
        shape = sequences, heads, columns, size
        self.keys = torch.zeros(shape, dtype=backbone.dtype, device=backbone.device)
        self.values = torch.zeros_like(self.keys)

    def update(
        self, layer: int, keys: Float[Tensor, "B H C D"], values: Float[Tensor, "B H C D"]
    ) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]]:
        """Return what was made up."""
        return self.keys, self.values


def _partial(call: Call, computed: int) -> Call:
    """A call whose layers compute some of the columns only, as if they computed that many and no others."""
    return replace(call, columns=-(-computed // call.sequences), reuses=True)


@contextmanager
def _watching(backbone: MaskedDiffusionModel) -> Iterator[list[tuple[Call, bool]]]:
    """Note the calls of the backbone, and whether their layers compute some columns only."""
    calls: list[tuple[Call, bool]] = []

    def note(module: Any, arguments: tuple[Any, ...]) -> None:
        tokens, _, _, store, select = arguments
        sequences, columns = tokens.shape
        calls.append((Call(sequences, columns, len(select), store is not None), isinstance(store, FeatureStore)))

    hook = backbone.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        hook.remove()
