"""A causal language model that verifies drafts: batched, with its own cropped KV cache.

Any Hugging Face `AutoModelForCausalLM` with full attention is supported. Rows differ in length and in
the number of accepted drafts, so every cache slot has the index of its token; slots of rejected tokens
are masked, cropped where no row needs them, and compacted when they are the majority.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from dllm.identity import checkpoint
from dllm.models import adapters
from dllm.models.checkpoint import check_causal_folder
from dllm.models.loading import checkpoint_folder, quiet
from dllm.models.tokenizers import check_tokenizer_config, load_tokenizer


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
        check_causal_folder(folder)
        with quiet():
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
class Judging:
    """A guide and its KV cache during one run.

    Attributes:
        guide: the guide.
        cache: keys and values, one entry per row of `rows`.
        rows: row numbers of the last call; -1 for a dropped row.
        ids: tokens of the last call.
        held: index of the token in each slot of the cache; -1 for invalid slots.
    """

    guide: Guide
    cache: Any = None
    rows: Int[Tensor, " B"] | None = None
    ids: Int[Tensor, "B T"] | None = None
    held: Int[Tensor, "B S"] | None = None
    seconds: float = 0.0

    def forget(self, row: int) -> None:
        """Drop the cache of a row."""
        if self.rows is not None:
            self.rows = self.rows.masked_fill(self.rows == row, -1)

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
        known = self._keep(rows, ids).minimum((start - 1).clamp(min=0))
        last = torch.where(lengths > start, lengths - 1, known)  # the last token is judged, but not an input
        width = int((last - known).amax())  # synchronizes, like `skip`: the width of the forward
        if width <= 0:
            return None
        self._drop(known)
        assert self.held is not None
        index = known[:, None] + torch.arange(width, device=ids.device)
        fresh = index < last[:, None]
        chunk = ids.gather(1, index.clamp(max=ids.shape[1] - 1)).where(fresh, 0)
        self.held = torch.cat((self.held, index.where(fresh, -1)), dim=1)
        # Logits are needed from the first judged token on, in the row where it comes first.
        skip = int((start - 1 - known).clamp(min=0).where(last > known, width - 1).amin())
        keep = width - skip
        out = self.guide.model(
            input_ids=chunk.where((chunk >= 0) & (chunk < self.guide.vocab_size), 0),
            attention_mask=(self.held >= 0).long(),
            position_ids=index,
            use_cache=True,
            logits_to_keep=keep,
            **{self.guide.cache_argument: self.cache},
        ).logits[:, -keep:]
        self.rows, self.ids = rows, ids
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        self.seconds += time.perf_counter() - started
        # A slot predicts the next token.
        about = index + 1
        return out, about.where(fresh & (about >= start[:, None]), ids.shape[1])[:, skip:]

    def _keep(self, rows: Tensor, ids: Tensor) -> Int[Tensor, " B"]:
        """Follow rows that left, came or moved; return the number of leading tokens of each row that are cached."""
        if self.rows is None:
            self.cache = DynamicCache()
            self.held = torch.empty((len(rows), 0), dtype=torch.long, device=rows.device)
            self.rows, self.ids = rows, ids
            return torch.zeros_like(rows)
        assert self.ids is not None
        assert self.held is not None
        # Synchronizes, like the sizes in `_drop`: a cache can only be cropped by host integers.
        if not torch.equal(self.rows, rows):
            same = rows[:, None] == self.rows
            entry = same.int().argmax(-1)
            self.cache.batch_select_indices(entry)
            # A new row has no cache; zeros, since masked values must not be NaN.
            known = same.any(-1)
            self.held = self.held[entry].where(known[:, None], -1)
            for layer in self.cache.layers:
                layer.keys, layer.values = (
                    each.where(known[:, None, None, None], 0) for each in (layer.keys, layer.values)
                )
            self.rows, self.ids = rows, self.ids[entry]
        width = min(ids.shape[1], self.ids.shape[1])
        same = (ids[:, :width] == self.ids[:, :width]).long().cumprod(-1).sum(-1)
        return same.minimum(F.pad(self.held, (1, 0), value=-1).amax(-1) + 1)

    def _drop(self, known: Int[Tensor, " B"]) -> None:
        """Drop all tokens from index `known` on."""
        assert self.held is not None
        held = self.held.where(self.held < known[:, None], -1)
        needed = int((held >= 0).sum(-1).amax())
        used = (held >= 0).any(0).nonzero()
        size = int(used[-1]) + 1 if len(used) else 0
        if size > 2 * needed:
            order = (held < 0).long().argsort(dim=1, stable=True)[:, :needed]
            for layer in self.cache.layers:
                at = order[:, None, :, None]
                layer.keys = layer.keys.take_along_dim(at, 2)
                layer.values = layer.values.take_along_dim(at, 2)
            held, size = held.gather(1, order), needed
        elif size < held.shape[1]:
            self.cache.crop(size - held.shape[1])  # negative: the number of slots to remove
        self.held = held[:, :size]
