"""Learn2PD filters (arXiv 2509.25188, section 3.3): classify which predictions of a block are final.

`ConfidenceFilter` is the published form: two layers over the confidences of one block, about 2,100
parameters for a block of 32. `NeighbourFilter` classifies a position by its neighbourhood instead: a small
convolution over the confidence c, -log(1 - c), whether the position is masked, and its offset in the
block. -log(1 - c) resolves confidences close to 1, which c alone hardly does: at a precision of 99.9% on
held-out prompts of the two bundled denoisers its recall of final tokens is 65% and 60%, that of the
published form 49% and 5% (`dllm train-filter` prints these numbers, `architecture=published` trains that form).

On disk a filter is ``NAME.safetensors`` with ``NAME.json``, a card with its training settings. A file in the
published form loads without a card: its shape determines the block length, and its model is unknown.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dllm.files import BUNDLED, expanded, parse_json, with_sorted_header, write_json, write_whole
from dllm.models.checkpoint import FLOATS, read_header
from dllm.stored import misfit, there

# Of the bundled filters, by what they were trained for: the order of confidence, or that of `anchored`.
_CONFIDENT, ANCHORED = "learn2pd", "anchored"
_FOUND = (None, ANCHORED)  # filters that are found by the model
FILTER_FORMAT = "dllm-filter"  # in the metadata of the files


class ConfidenceFilter(nn.Module):
    """fc2(relu(fc1(confidences))): one logit per position of the block, positive where the prediction is final.

    Args:
        block_length: number K of inputs and outputs.
        hidden: width of its hidden layer; K is published.
    """

    architecture: ClassVar[str] = "published"

    def __init__(self, block_length: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = block_length if hidden is None else hidden
        self.block_length = block_length
        self.fc1 = nn.Linear(block_length, hidden)
        self.fc2 = nn.Linear(hidden, block_length)

    def forward(
        self, confidence: Float[Tensor, "B K"], masked: Bool[Tensor, "B K"], inside: Bool[Tensor, "B K"]
    ) -> Float[Tensor, "B K"]:
        """Logits that the predictions are final; missing positions of a short block have confidence 1."""
        return self.fc2(self.fc1(confidence.masked_fill(~inside, 1.0)).relu())


class NeighbourFilter(nn.Module):
    """Two convolutions over the features of a block's positions and a linear read-out; for any block length.

    Args:
        hidden: channels.
        reach: positions on either side in one convolution.
    """

    architecture: ClassVar[str] = "neighbours"
    block_length: ClassVar[None] = None

    def __init__(self, hidden: int = 24, reach: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, hidden, 2 * reach + 1, padding=reach)
        self.conv2 = nn.Conv1d(hidden, hidden, 2 * reach + 1, padding=reach)
        self.out = nn.Conv1d(hidden, 1, 1)

    def forward(
        self, confidence: Float[Tensor, "B K"], masked: Bool[Tensor, "B K"], inside: Bool[Tensor, "B K"]
    ) -> Float[Tensor, "B K"]:
        """Logits that the predictions are final; missing positions of a short block are zero padding."""
        # 16 is about -log of the float32 machine epsilon, 32 the published block length.
        doubt = -(1 - confidence).clamp(min=1e-7).log() / 16
        place = torch.arange(confidence.shape[1], dtype=confidence.dtype, device=confidence.device) / 32
        features = torch.stack((confidence, doubt, masked.float(), place.expand_as(confidence)), dim=1)
        exists = inside[:, None]
        hidden = self.conv1(features.where(exists, 0.0)).relu()
        hidden = self.conv2(hidden.where(exists, 0.0)).relu()
        return self.out(hidden)[:, 0]


FilterNetwork: TypeAlias = ConfidenceFilter | NeighbourFilter
_PUBLISHED = {"fc1.weight": 2, "fc1.bias": 1, "fc2.weight": 2, "fc2.bias": 1}
_WIDEST = 2**14  # limits allocation for invalid files
_NEIGHBOURS = {"conv1.weight": 3, "conv1.bias": 1, "conv2.weight": 3, "conv2.bias": 1, "out.weight": 3, "out.bias": 1}


@dataclass(frozen=True)
class FilterCard:
    """The training settings of a filter and its metrics on held-out prompts (also used for early stopping).

    Attributes:
        architecture: "published" or "neighbours".
        block_length: positions K of a block.
        backbone: name of the denoiser.
        fingerprint: of its weights, by `MaskedDiffusionModel.fingerprint`.
        cache: options of the cache used for the records.
        sampler: options of the policy whose results are the labels.
        data: source of the prompts.
        prompts: number of prompts.
        seed: of prompts, split and training.
        records: numbers of (confidences, is final) pairs for training and held out.
        held_out: loss, and precision and recall at several thresholds.
        calibration: per bin of the predicted probability its mean, the share that was final, and the count.
    """

    architecture: str
    block_length: int
    backbone: str
    fingerprint: str
    cache: dict[str, Any]
    sampler: dict[str, Any]
    data: str
    prompts: int
    seed: int
    records: dict[str, int]
    held_out: dict[str, Any]
    calibration: list[dict[str, float]]


@dataclass(frozen=True)
class Filter:
    """A filter and its card (None for a file without one)."""

    network: FilterNetwork
    card: FilterCard | None
    name: str

    def save(self, path: Path) -> None:
        """Write the tensors to `path`, a .safetensors file, and the card next to it."""
        tensors = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        metadata = {"format": FILTER_FORMAT}
        if self.card is not None:
            metadata["card"] = _digest(asdict(self.card))
        write_whole(path, with_sorted_header(save(tensors, metadata)))
        if self.card is not None:
            write_json(path.with_suffix(".json"), asdict(self.card))


def filter_layouts() -> list[set[str]]:
    """The tensor names of both forms."""
    return [set(_PUBLISHED), set(_NEIGHBOURS)]


def bundled_filters(kind: str | None = None) -> list[str]:
    """Names of the bundled filters: MODEL, or MODEL/anchored for those under `anchored`; of both kinds by default."""
    kinds = (_CONFIDENT, ANCHORED) if kind is None else (kind,)
    found = {each: sorted(path.parent.name for path in BUNDLED.glob(f"*/{each}.safetensors")) for each in kinds}
    return [model if each == _CONFIDENT else f"{model}/{each}" for each, models in found.items() for model in models]


def filter_files(name: str | Path | None) -> list[Path]:
    """The files that `load_filter` reads for a name, or `find_filter` for None and "anchored"."""
    tensors = [_path_of(each) for each in (bundled_filters(name or _CONFIDENT) if name in _FOUND else [name])]
    return [file for each in tensors for file in (each, each.with_suffix(".json")) if file.is_file()]


def find_filter(fingerprint: str, block_length: int, kind: str | None = None) -> Filter:
    """The bundled filter of a denoiser.

    Args:
        fingerprint: of its weights.
        block_length: positions of a block.
        kind: "anchored" for the filter under that policy; None for the other.

    Raises:
        ValueError: there is none for this model and block length.
    """
    names = bundled_filters(kind or _CONFIDENT)
    for name in names:
        found = load_filter(name)
        if found.card is not None and (found.card.fingerprint, found.card.block_length) == (fingerprint, block_length):
            return found
    order = " sampler.order=left_to_right" if kind == ANCHORED else ""
    raise ValueError(
        f"filter={kind or 'null'}: there is no bundled filter for this model in its dtype at "
        f"block_length={block_length}; train one with "
        f"`dllm train-filter model=... block_length=...{order}` and give its file, or set "
        f"filter={names[0]} (of {', '.join(names)}) and allow_mismatch=true"
    )


def load_filter(name: str | Path) -> Filter:
    """Load a filter.

    Args:
        name: of a bundled filter, or a safetensors file, with or without a card.

    Raises:
        ValueError: an unknown filter, or a file that is damaged or not a filter.
    """
    path = _path_of(name)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(
            f"filter={str(name)!r} is not a bundled filter nor an existing .safetensors file; bundled are "
            f"{', '.join(bundled_filters())} (pickled filters are not loaded, as they can run code)"
        )
    try:
        header = dict(read_header(path))
    except ValueError:
        raise ValueError(f"filter={str(name)!r} is damaged: its header is incomplete; make it again") from None
    network = _build({key: tensor.shape for key, tensor in header.items()}, str(name))
    wrong = next((f"{key} is {stored.dtype}" for key, stored in header.items() if stored.dtype not in FLOATS), None)
    if wrong is not None:
        raise ValueError(f"filter={str(name)!r} is not a filter: {wrong}, not floating-point numbers; make it again")
    # Copies: memory-mapped tensors would change with the file.
    tensors = {key: tensor.to(torch.float32, copy=True) for key, tensor in load_file(path).items()}
    wrong = next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if wrong is not None:
        raise ValueError(f"filter={str(name)!r} is not a filter: {wrong} holds NaN or infinity; make it again")
    network.load_state_dict(tensors, assign=True)
    card = _load_card(path.with_suffix(".json"), network)
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get("card")
    # The two files may be inconsistent after an interruption.
    if card is not None and written is not None and written != _digest(asdict(card)):
        raise ValueError(f"filter={str(name)!r} has the card of another filter; make it again")
    return Filter(network.eval(), card, str(name))


def _path_of(name: str | Path) -> Path:
    if str(name) not in bundled_filters():
        return expanded(name)
    model, _, kind = str(name).partition("/")
    return BUNDLED / model / f"{kind or _CONFIDENT}.safetensors"


def _build(shapes: dict[str, tuple[int, ...]], name: str) -> FilterNetwork:
    """The network for tensors of these shapes, on the meta device."""
    layout = {key: len(shape) for key, shape in shapes.items()}
    if layout not in (_PUBLISHED, _NEIGHBOURS):
        forms = " or ".join(", ".join(form) for form in (_PUBLISHED, _NEIGHBOURS))
        raise ValueError(f"filter={name!r} is not a filter: it must hold {forms}, and nothing else; give another file")
    first = shapes["fc1.weight" if layout == _PUBLISHED else "conv1.weight"]
    if not 1 <= min(first) <= max(first) <= _WIDEST:
        raise ValueError(f"filter={name!r} is not a filter: a width is not from 1 to {_WIDEST}; make it again")
    network: FilterNetwork
    with torch.device("meta"):
        network = (
            ConfidenceFilter(first[1], first[0]) if layout == _PUBLISHED else NeighbourFilter(first[0], first[2] // 2)
        )
    if {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} != shapes:
        raise ValueError(f"filter={name!r} is not a filter: its tensors do not fit together; make it again")
    return network


def _digest(card: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def _load_card(path: Path, network: FilterNetwork) -> FilterCard | None:
    if not there(path, "make the filter again, or remove it"):
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if wrong := misfit(content, FilterCard):
            raise ValueError(wrong)
        card = FilterCard(**content)
        if card.block_length < 1:
            raise ValueError(f"block_length={card.block_length} is not a valid length")
        if card.architecture != network.architecture:
            raise ValueError(f"architecture={card.architecture!r}, and the tensors are of {network.architecture!r}")
        if network.block_length not in (None, card.block_length):
            raise ValueError(f"block_length={card.block_length}, and the tensors are for {network.block_length}")
    except ValueError as error:
        raise ValueError(f"{path} is not a card of a filter ({error}); make it again, or remove it") from None
    return card
