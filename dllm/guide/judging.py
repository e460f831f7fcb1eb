"""A causal language model that verifies drafts: batched, with its own KV cache.

Any Hugging Face `AutoModelForCausalLM` with full attention is supported. Keys and values are kept at the index of their
token: those of rejected tokens are overwritten, and excluded from attention until then. They stay at one address, so
narrow forwards can be replayed from CUDA graphs.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping
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

from dllm.checks import out_of_memory, telling_panics
from dllm.decoding.graphs import AFTER, NARROW, Replays, weights_of
from dllm.decoding.layout import WIDTHS
from dllm.decoding.setup import Setup
from dllm.identity import checkpoint
from dllm.models import adapters
from dllm.models.checkpoint import ATTENTION, check_causal_folder
from dllm.models.expressions import check_quantiser
from dllm.models.growth import check_prompts, check_texts
from dllm.models.loading import checkpoint_folder, quiet
from dllm.models.published import is_whole
from dllm.models.tokenizers import check_tokenizer_config, check_vocabulary, load_tokenizer

_NONE = -2  # no token; -1 is a token that the guide lacks
_STEP = 64  # columns that are added at a time, or attended to
_KEPT = "guide"  # of a setup


@dataclass(frozen=True, eq=False)
class Guide:
    """A causal model and its tokenizer; None if it uses the denoiser's token ids."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    def __post_init__(self) -> None:
        config = self.model.config.get_text_config()
        sliding = getattr(config, "sliding_window", None) is not None
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"])
        named = "position_ids" in inspect.signature(self.model.forward).parameters
        # GPT-Neo masks keys by where they lie, whatever mask it is given.
        if kinds != {"full_attention"} or not named or hasattr(config, "attention_layers"):
            raise ValueError(
                f"guide={self.name!r} cannot be cropped ({type(self.model).__name__} with "
                f"{', '.join(sorted(kinds))}); use a causal model with full attention and position ids"
            )
        if (used := config._attn_implementation) not in ATTENTION:  # others take no mask of single columns
            raise ValueError(f"guide={self.name!r} has attn_implementation={used!r}; use {' or '.join(ATTENTION)}")

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
        config = self.model.config.get_text_config().to_dict()
        ropes = {str(getattr(each, "rope_type", "")) for each in self.model.modules()}
        return (
            getattr(self.model, "hf_quantizer", None) is None
            and not _has_experts(config)
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
            check_quantiser(folder)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **nothing_else
            )
            if (folder / "tokenizer.json").is_file():
                tokenizer = load_tokenizer(folder)  # AutoTokenizer would choose the class by model type
            elif any((folder / file).is_file() for file in ("vocab.json", "tokenizer.model")):
                check_tokenizer_config(folder)
                with telling_panics("its tokenizer cannot be read", "copy its files again from the published model"):
                    tokenizer = AutoTokenizer.from_pretrained(folder, **nothing_else)
                if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
                    content = json.loads(backend.to_str())
                    check_prompts(content)
                    check_texts(content, tokenizer.get_vocab())
                    check_vocabulary(tokenizer, content["model"])
        model, info = loaded
        # They would be initialized at random.
        lost = [
            *info["missing_keys"],
            *(each if isinstance(each, str) else each[0] for each in info["mismatched_keys"]),
        ]
        if lost:
            raise ValueError(f"tensor {min(lost)} is missing or has another shape than in config.json")
    except Exception as error:  # transformers' models and tokenizers may raise anything
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:  # transformers' advice
            reason = "it needs Python code of its own, which is never run; give a model of a type that transformers has"
        raise ValueError(f"guide={name!r} is not a causal language model that can be loaded: {reason}") from None
    placed: PreTrainedModel = nn.Module.to(model, device)
    return Guide(placed.eval(), tokenizer)


@dataclass
class _Present:
    """How many keys and values there are, and which of them the present forward writes and attends to.

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

    def __init__(self, now: _Present) -> None:
        super().__init__()
        self._now, self._kept = now, list[Tensor]()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the keys and values (B, H, W, d) of a forward; return those that it attends to (B, H, S, d)."""
        now, fresh = self._now, (key_states, value_states)
        slots, columns = now.shape
        if not self._kept:
            # Zeros, since what is excluded from attention must not be NaN.
            self._kept = [each.new_zeros((slots, each.shape[1], columns, each.shape[3])) for each in fresh]
        for kept, each in zip(self._kept, fresh, strict=True):
            kept[now.rows[:, None], :, now.columns] = each.transpose(1, 2)
        keys, values = (kept[:, :, : now.span] if slots == 1 else kept[now.rows, :, : now.span] for kept in self._kept)
        return keys, values

    def forget(self, row: int) -> None:
        """Clear a row, whose values may be NaN."""
        for kept in self._kept:
            kept[row] = 0

    def resize(self) -> None:
        """Move to as many columns as there are now."""
        self._kept = [F.pad(kept, (0, 0, 0, self._now.shape[1] - kept.shape[2])) for kept in self._kept]


class Judging:
    """A guide and its KV cache during one run.

    Keys and values take 2 * layers * rows * heads * columns * head size numbers, with columns for at most twice the
    longest text, or 64, and one more. With graphs, logits take up to 512 * vocabulary numbers, once for all graphs.

    Args:
        guide: the guide.
        rows: of the engine.
        new_replays: makes graphs of its narrow forwards; None to launch all.

    Attributes:
        held: the tokens whose keys and values are cached, each in the column of its index.
        seconds: wall time of the guide.
    """

    def __init__(self, guide: Guide, rows: int, new_replays: Callable[[], Replays] | None = None) -> None:
        self.guide, self.seconds = guide, 0.0
        device = guide.model.device
        self.held = torch.full((rows, 0), _NONE, device=device)
        self._now = _Present((rows, 1), torch.arange(rows, device=device), self.held)
        layers: Any = partial(_Columns, self._now)
        self.cache: Any = Cache(layer_class_to_replicate=layers)
        self._new_replays = new_replays if guide.is_static else None
        self._replays: Replays | None = None
        self._logits: Tensor | None = None  # of every graph
        self._weights = weights_of(guide.model)

    @classmethod
    def of(cls, guide: Guide, setup: Setup) -> Judging:
        """For an engine: that of the last one, if its graphs are those of this guide."""
        last: Judging | None = setup.kept.pop(_KEPT, None)
        same = last is not None and last.guide.model is guide.model and len(last.held) == setup.slots
        if last is None or not same or last._weights != weights_of(guide.model):
            last = cls(guide, setup.slots, setup.replays)
        if last._new_replays is not None:
            setup.kept[_KEPT] = last
        return last

    @torch.inference_mode()
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
            Logits, which the next call may overwrite, and the index of the token that each predicts; T for unused
            ones. None if no row is judged.
        """
        started = time.perf_counter()
        self._make_room(ids.shape[1])
        held = self.held[rows, : ids.shape[1]]
        known = (held == ids).long().cumprod(-1).sum(-1).minimum((start - 1).clamp(min=0))
        last = torch.where(lengths > start, lengths - 1, known)  # the last token is judged, but not an input
        # Logits are needed from the first judged token on, in the row where it comes first.
        before = (start - 1 - known).clamp(min=0).where(last > known, ids.shape[1])
        # Synchronizes: the sizes of the forward.
        sizes = (last - known).amax(), before.amin(), last.amax(), known.amax()
        width, skip, span, old = torch.stack(sizes).tolist()
        if width <= 0:
            return None
        index = known[:, None] + torch.arange(width, device=ids.device)
        fresh = index < last[:, None]
        chunk = ids.gather(1, index.clamp(max=ids.shape[1] - 1)).where(fresh, 0)
        chunk = chunk.where((chunk >= 0) & (chunk < self.guide.vocab_size), 0)
        self.held[rows] = _NONE  # for an interrupted forward
        # Tokens that are not kept lie in the spare column.
        inputs = rows, chunk, index.where(fresh, 0), index.where(fresh, self.held.shape[1])
        out = self._replayed(span, *inputs)
        if out is None:
            out = self._forward(span, width - skip, old > 0, *inputs)
            if self._logits is None and self._new_replays is not None:
                self._logits = out.new_empty((NARROW, out.shape[-1]))
        else:
            out = out[:, skip:width]
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
        masked: bool,
        rows: Int[Tensor, " B"],
        chunk: Int[Tensor, "B W"],
        index: Int[Tensor, "B W"],
        columns: Int[Tensor, "B W"],
    ) -> Float[Tensor, "B N V"]:
        """Logits of the last tokens of a chunk.

        Args:
            span: columns that are attended to.
            keep: number of tokens.
            masked: whether a token attends by its index; or else to all before it in the chunk, which is all there is.
            rows: of the sequences.
            chunk: tokens.
            index: of each token in its row.
            columns: where it is kept.
        """
        self._now.rows, self._now.columns, self._now.span = rows, columns, span
        mask = None
        if masked:
            dtype = self.guide.model.dtype
            seen = torch.arange(span, device=index.device) <= index[..., None]
            mask = torch.zeros((), dtype=dtype, device=index.device).where(seen, torch.finfo(dtype).min)[:, None]
        out = self.guide.model(
            input_ids=chunk,
            attention_mask=mask,
            position_ids=index,
            use_cache=True,
            logits_to_keep=keep,
            **{self.guide.cache_argument: self.cache},
        )
        logits: Tensor = out.logits[:, -keep:]
        return logits

    def _replayed(
        self,
        span: int,
        rows: Int[Tensor, " B"],
        chunk: Int[Tensor, "B W"],
        index: Int[Tensor, "B W"],
        columns: Int[Tensor, "B W"],
    ) -> Float[Tensor, "B W2 V"] | None:
        """Logits of a chunk, and of more after it, from a graph; None if it shall be launched."""
        count, width = chunk.shape
        wide = next((each for each in WIDTHS if each >= width), width)
        if self._new_replays is None or self._logits is None or count * wide > NARROW:
            return None
        if self._replays is None:
            self._replays = self._new_replays()
        span, kept = -(-span // _STEP) * _STEP, self._logits[: count * wide].view(count, wide, -1)

        def run(*inputs: Tensor) -> Tensor:
            return kept.copy_(self._forward(span, wide, True, *inputs))

        more = (0, wide - width)
        padded = rows, F.pad(chunk, more), F.pad(index, more), F.pad(columns, more, value=self.held.shape[1])
        return self._replays((count, wide, span), run, padded, AFTER, count)

    def _make_room(self, length: int) -> None:
        """Have columns for rows of a length."""
        if length <= self.held.shape[1]:
            return
        columns = max(2 * self.held.shape[1], -(-length // _STEP) * _STEP)
        self.held = F.pad(self.held, (0, columns - self.held.shape[1]), value=_NONE)
        self._now.shape = len(self.held), columns + 1
        for layer in self.cache.layers:
            layer.resize()
        self._replays = None  # its graphs use the old columns


def _has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config names experts, which are chosen by the tokens."""
    return any(
        _has_experts(value) if isinstance(value, Mapping) else "expert" in str(name) and is_whole(value) and value > 0
        for name, value in config.items()
    )
