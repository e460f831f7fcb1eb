"""A causal language model that verifies drafts: batched, with its own KV cache.

Any Hugging Face `AutoModelForCausalLM` with full attention is supported. Keys and values are kept at the index of their
token: those of rejected tokens are overwritten, and excluded from attention until then. They stay at one address, so
narrow forwards can be replayed from CUDA graphs.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from dllm.decoding.graphs import Replays
from dllm.decoding.layout import WIDTHS
from dllm.identity import checkpoint
from dllm.models import adapters
from dllm.models.checkpoint import check_causal_folder
from dllm.models.loading import checkpoint_folder, quiet
from dllm.models.tokenizers import check_tokenizer_config, load_tokenizer

_NONE = -2  # no token; the guide lacks tokens that are -1
_STEP = 64  # columns that are added at a time, or attended to
_NARROW = 512  # columns of a forward, over all sequences, up to which launching takes longer than computing
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_AFTER = 1  # forwards of a shape that are launched before it is captured


@dataclass(frozen=True, eq=False)
class Guide:
    """A causal model and its tokenizer; None if it uses the denoiser's token ids."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    def __post_init__(self) -> None:
        config = self.model.config.get_text_config()
        sliding = getattr(config, "sliding_window", None) is not None
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"])
        if kinds != {"full_attention"} or "position_ids" not in inspect.signature(self.model.forward).parameters:
            raise ValueError(
                f"guide={self.name!r} cannot be cropped ({type(self.model).__name__} with "
                f"{', '.join(sorted(kinds))}); use a causal model with full attention and position ids"
            )

    @property
    def name(self) -> str:
        """Name in errors."""
        return self.model.name_or_path or type(self.model).__name__

    @property
    def vocab_size(self) -> int:
        """Size of its vocabulary."""
        return self.model.config.get_text_config().vocab_size

    @cached_property
    def is_static(self) -> bool:
        """Whether its forward computes the same kernels whatever the tokens, so that it can be captured in a graph."""
        config = self.model.config.get_text_config()
        ropes = {str(getattr(each, "rope_type", "")) for each in self.model.modules()}
        return (
            getattr(self.model, "hf_quantizer", None) is None
            and not any(getattr(config, name, None) for name in _EXPERTS)
            and not any("dynamic" in rope or "longrope" in rope for rope in ropes)
            and len({each.device for each in self.model.parameters()}) == 1
        )

    @cached_property
    def cache_argument(self) -> str:
        """Name of the cache argument of `forward`: `cache` since transformers 5.24, `past_key_values` before."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"


@lru_cache(maxsize=8)  # one request to the hub
def guide_folder(name: str) -> Path:
    """The folder of a guide; downloaded from the hub if needed."""
    return checkpoint_folder(name, option="guide", known=("tiny-guide",))


def load_guide(name: str, device: torch.device) -> Guide:
    """Load a guide; the last one is cached while its files are unchanged.

    Args:
        name: a bundled model such as "tiny-guide", a local folder, or a hub id.
        device: of the guide.

    Raises:
        ValueError: an unknown model, or one that is not a causal language model or cannot be cropped.
    """
    folder = guide_folder(name)
    if (folder / adapters.CONFIG).is_file():  # transformers would apply it only if peft is installed
        raise ValueError(
            f"guide={name!r} holds an adapter ({adapters.CONFIG}), which is not applied; merge it into the guide's "
            f"weights and save them, or remove {adapters.CONFIG}"
        )
    return _load(name, folder, device, repr(checkpoint(folder)))


@lru_cache(maxsize=1)
def _load(name: str, folder: Path, device: torch.device, state: str) -> Guide:
    nothing_else: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = None
    try:
        with quiet():
            check_causal_folder(folder)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **nothing_else
            )
            if (folder / "tokenizer.json").is_file():
                tokenizer = load_tokenizer(folder)  # AutoTokenizer would choose the class by model type
            elif any((folder / file).is_file() for file in ("vocab.json", "tokenizer.model")):
                check_tokenizer_config(folder)
                tokenizer = AutoTokenizer.from_pretrained(folder, **nothing_else)
        model, info = loaded
        # They would be initialized at random.
        lost = [
            *info["missing_keys"],
            *(each if isinstance(each, str) else each[0] for each in info["mismatched_keys"]),
        ]
        if lost:
            raise ValueError(f"tensor {min(lost)} is missing or has another shape than in config.json")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # transformers' models and tokenizers may raise anything
        raise ValueError(
            f"guide={name!r} is not a causal language model that can be loaded: {' '.join(str(error).split())}"
        ) from None
    placed: PreTrainedModel = nn.Module.to(model, device)
    return Guide(placed.eval(), tokenizer)


@dataclass
class _Place:
    """Where keys and values are kept, and which of them the present forward writes and attends to.

    Attributes:
        shape: rows, and columns of each; the last one is spare.
        rows: the row of each sequence of the forward.
        columns: of its tokens; the spare one for those that are not kept.
        span: columns that are attended to.
    """

    shape: tuple[int, int]
    rows: Int[Tensor, " B"]
    columns: Int[Tensor, "B W"]
    span: int = 0


class _Columns(DynamicLayer):
    """Keys and values of a layer, at an address that changes only when it is resized."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self._place, self._kept = place, list[Tensor]()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the keys and values (B, H, W, d) of a forward; return those that it attends to (B, H, S, d)."""
        place, fresh = self._place, (key_states, value_states)
        if not self._kept:
            # Zeros, since what is excluded from attention must not be NaN.
            self._kept = [each.new_zeros((*place.shape, each.shape[1], each.shape[3])) for each in fresh]
        for kept, each in zip(self._kept, fresh, strict=True):
            kept[place.rows[:, None], place.columns] = each.transpose(1, 2)
        seen = (kept if place.shape[0] == 1 else kept[place.rows] for kept in self._kept)
        keys, values = (each[:, : place.span].transpose(1, 2) for each in seen)
        return keys, values

    def forget(self, row: int) -> None:
        """Clear a row, whose values may be NaN."""
        for kept in self._kept:
            kept[row] = 0

    def resize(self) -> None:
        """Move to as many columns as there are now."""
        columns = self._place.shape[1]
        self._kept = [F.pad(kept, (0, 0, 0, 0, 0, columns - kept.shape[1])) for kept in self._kept]


class Judging:
    """A guide and its KV cache during one run.

    Keys and values take 2 * layers * rows * heads * columns * head size numbers, with columns for at most twice the
    longest text, or 64.

    Args:
        guide: the guide.
        rows: of the engine.
        replays: makes graphs of its forwards, the narrow ones; None to launch all.

    Attributes:
        held: the tokens whose keys and values are cached, each in the column of its index.
        seconds: wall time of the guide.
    """

    def __init__(self, guide: Guide, rows: int, replays: Callable[[], Replays] | None = None) -> None:
        self.guide, self.seconds = guide, 0.0
        device = guide.model.device
        self.held = torch.full((rows, 0), _NONE, device=device)
        self._place = _Place((rows, 1), torch.arange(rows, device=device), self.held)
        layers: Any = partial(_Columns, self._place)
        self.cache: Any = Cache(layer_class_to_replicate=layers)
        self._graphs = replays if guide.is_static else None
        self._replays = self._graphs and self._graphs()

    def forget(self, row: int) -> None:
        """Drop the cache of a row."""
        self.held[row] = _NONE
        for layer in self.cache.layers:
            layer.forget(row)

    @torch.inference_mode()
    def logits(
        self, rows: Int[Tensor, " B"], ids: Int[Tensor, "B T"], lengths: Int[Tensor, " B"], start: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B N V"], Int[Tensor, "B N"]] | None:
        """The guide's logits from index `start` on.

        Args:
            rows: numbers of the rows of the entries.
            ids: tokens, left-aligned; -1 for tokens that the guide lacks.
            lengths: of each row; a row of length `start` is not judged.
            start: index of the first judged token; token 0 has no context and no logits.

        Returns:
            Logits, and the index of the token that each predicts; T for unused ones. None if no row is
            judged.
        """
        started = time.perf_counter()
        self._make_room(ids.shape[1])
        held = self.held[rows, : ids.shape[1]]
        known = (held == ids).long().cumprod(-1).sum(-1).minimum((start - 1).clamp(min=0))
        last = torch.where(lengths > start, lengths - 1, known)  # the last token is judged, but not an input
        # Logits are needed from the first judged token on, in the row where it comes first.
        before = (start - 1 - known).clamp(min=0).where(last > known, ids.shape[1])
        # Synchronizes: the sizes of the forward.
        width, skip, span = torch.stack(((last - known).amax(), before.amin(), last.amax())).tolist()
        if width <= 0:
            return None
        replayed = self._replays is not None and len(rows) * width <= _NARROW
        if replayed:
            width, skip = next(each for each in WIDTHS if each >= width), 0
            span = -(-span // _STEP) * _STEP
        index = known[:, None] + torch.arange(width, device=ids.device)
        fresh = index < last[:, None]
        chunk = ids.gather(1, index.clamp(max=ids.shape[1] - 1)).where(fresh, 0)
        chunk = chunk.where((chunk >= 0) & (chunk < self.guide.vocab_size), 0)
        self.held[rows] = _NONE  # for an interrupted forward
        inputs = rows, chunk, index.where(fresh, 0), index.where(fresh, self.held.shape[1])
        run, out = partial(self._forward, span, width - skip), None
        if self._replays is not None and replayed:
            out = self._replays((len(rows), width, span), run, inputs, _AFTER, len(rows))
        if out is None:
            out = run(*inputs)
        column = torch.arange(self.held.shape[1], device=ids.device)
        longer = F.pad(ids, (0, self.held.shape[1] - ids.shape[1]), value=_NONE)
        self.held[rows] = longer.where(column < last[:, None], _NONE)
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        self.seconds += time.perf_counter() - started
        # A column predicts the next token.
        about = index + 1
        return out, about.where(fresh & (about >= start[:, None]), ids.shape[1])[:, skip:]

    def _forward(
        self,
        span: int,
        keep: int,
        rows: Int[Tensor, " B"],
        chunk: Int[Tensor, "B W"],
        index: Int[Tensor, "B W"],
        columns: Int[Tensor, "B W"],
    ) -> Float[Tensor, "B N V"]:
        """Logits of the last tokens of a chunk.

        Args:
            span: columns that are attended to.
            keep: number of tokens.
            rows: of the sequences.
            chunk: tokens.
            index: of each token in its row.
            columns: where it is kept.
        """
        self._place.rows, self._place.columns, self._place.span = rows, columns, span
        dtype = self.guide.model.dtype
        seen = torch.arange(span, device=index.device) <= index[..., None]
        mask = torch.zeros((), dtype=dtype, device=index.device).where(seen, torch.finfo(dtype).min)
        out = self.guide.model(
            input_ids=chunk,
            attention_mask=mask[:, None],
            position_ids=index,
            use_cache=True,
            logits_to_keep=keep,
            **{self.guide.cache_argument: self.cache},
        )
        logits: Tensor = out.logits[:, -keep:]
        return logits

    def _make_room(self, length: int) -> None:
        """Have columns for rows of a length."""
        if length <= self.held.shape[1]:
            return
        columns = max(2 * self.held.shape[1], -(-length // _STEP) * _STEP)
        self.held = F.pad(self.held, (0, columns - self.held.shape[1]), value=_NONE)
        self._place.shape = len(self.held), columns + 1
        for layer in self.cache.layers:
            layer.resize()
        self._replays = self._graphs and self._graphs()  # those captured use the old columns
