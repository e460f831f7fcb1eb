"""A policy with the setting that `dllm calibrate` certified, for the model it was certified for.

The guarantee is for the cache, the lengths, the sampling, the precision and the files (filters, guides, tables) that
the card was made with; under others a notice says so.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dllm.calibration import Calibration
from dllm.checks import Notice
from dllm.decoding.options import block_length_of
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.escape import brief
from dllm.resolve import CALIBRATION, build, names, resolve, with_option
from dllm.samplers.base import Denoise, Policy, Sampler
from dllm.structure.formats import read_format


@dataclass
class CalibratedState:
    """State of an engine.

    Attributes:
        state: that of the policy.
        setup: of the engine.
        files: hashes of the card's files, then and now.
        told: whether the notice was given.
    """

    state: Any
    setup: Setup
    files: dict[str, tuple[str, str]]
    told: bool = False


@dataclass(frozen=True)
class Calibrated:
    """The policy of a card, or one with the same options, with the certified value.

    Args:
        calibration: file of the card.
        base: the policy; its knob is set. None for that of the card.

    Raises:
        ValueError: no card, one that certifies nothing, or one of another policy.
    """

    calibration: str | Path
    base: Sampler | None = None
    card: Calibration = field(init=False, repr=False, compare=False)
    policy: Sampler = field(init=False, repr=False)
    cache: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        card = Calibration.read(self.calibration)
        if card.value is None:
            raise ValueError(
                f"calibration={str(self.calibration)!r} certifies no {card.knob}: none {card.guarantee}; "
                "calibrate with safer values, more problems or a larger loss, on problems that were not tested yet"
            )
        try:
            if CALIBRATION in card.sampler:
                raise ValueError("it names another card")
            own: Any = build("sampler", with_option("sampler", card.sampler, card.knob, card.value), Sampler)
            cache = build("cache", card.cache, object)
            read_format(card.options.get("response_format"))
        except ValueError as error:
            raise ValueError(
                f"calibration={str(self.calibration)!r} is damaged ({error}); make it again with dllm calibrate"
            ) from None
        if self.base is not None:
            given: Any = self.base
            if type(given) is not type(own) or _turned(given, card.knob, card.value) != own:
                raise ValueError(
                    f"calibration={str(self.calibration)!r} is of {card.sampler}; use this policy with these options"
                )
        object.__setattr__(self, "card", card)
        object.__setattr__(self, "policy", own)
        object.__setattr__(self, "cache", cache)

    @property
    def kind(self) -> str:
        """As the policy."""
        return str(getattr(self.policy, "kind", Policy.kind))

    @property
    def single_forward(self) -> bool:
        """As the policy."""
        return self.policy.single_forward

    @property
    def needs(self) -> frozenset[str]:
        """As the policy."""
        return self.policy.needs

    def files(self) -> Iterable[Path]:
        """The card, and those of the policy."""
        return (Path(self.calibration), *self.policy.files())

    def reach(self, request: Request) -> int | None:
        """As the policy."""
        return self.policy.reach(request)

    def opening(self, request: Request) -> int | None:
        """As the policy."""
        return self.policy.opening(request)

    def start(self, setup: Setup) -> CalibratedState:
        """Reject another model, and start the policy."""
        self.card.check(setup.fingerprint())
        return CalibratedState(self.policy.start(setup), setup, self.card.compared(self.policy))

    def check(self, state: CalibratedState, request: Request) -> None:
        """As the policy; once, warn of a request that the guarantee does not cover."""
        self.policy.check(state.state, request)
        if not state.told and (differing := self._differing(state, request)):
            state.told = True
            measured, used = (", ".join(f"{name}={_text(pair[k])}" for name, pair in differing.items()) for k in (0, 1))
            message = f"calibration={str(self.calibration)!r} was measured with {measured}, and is used with {used}"
            warnings.warn(f"{message}: its guarantee does not hold; calibrate with these", Notice, stacklevel=2)

    def enter(self, state: CalibratedState, row: int, request: Request) -> None:
        """As the policy."""
        self.policy.enter(state.state, row, request)

    def step(self, window: Window, denoise: Denoise, state: CalibratedState) -> Edit:
        """One step of the policy."""
        return self.policy.step(window, denoise, state.state)

    def _differing(self, state: CalibratedState, request: Request) -> dict[str, tuple[Any, Any]]:
        """The settings of the card that are others here, with both values."""
        found: dict[str, tuple[Any, Any]] = {}
        setup = state.setup
        if setup.cache is not None:
            measured, used = _written(self.cache), _written(setup.cache)
            names = [name for name in measured if name in used] if measured["cache"] == used["cache"] else ["cache"]
            found = {name: (measured[name], used[name]) for name in names}
        options = self.card.options
        if not request.infill:
            found["gen_length"] = options.get("gen_length"), "auto" if request.open_ended else request.span
        block = options.get("block_length")
        if not isinstance(block, int):
            card, own = self.card.defaults, setup.own_block_length
            own = own if card is None else card["block_length"]
            block = block_length_of(block, sys.maxsize, None) if own is None else own
        # A block that is longer than what is generated is all of it.
        if len({min(each or request.span, request.span) for each in (block, request.blocks)}) > 1:
            found["block_length"] = block, request.blocks
        found |= self._sampling(setup, request) | state.files
        found |= self.card.compared_dtype(str(setup.dtype).removeprefix("torch."))
        return {name: pair for name, pair in found.items() if pair[0] != pair[1]}

    def _sampling(self, setup: Setup, request: Request) -> dict[str, tuple[Any, Any]]:
        """How tokens are chosen: on the card, where null is the default, and here."""
        options, used, form = self.card.options, request.sampling, read_format(self.card.options.get("response_format"))
        eos = options.get("eos_token_id")
        card = self.card.defaults
        own = setup.sampling().eos_token_ids if card is None else card["eos_token_id"]
        ends = own if eos is None else (eos,) if isinstance(eos, int) else eos
        found: dict[str, tuple[Any, Any]] = {
            "temperature": (options.get("temperature") or 0.0, used.temperature),
            "eos_suppression": (options.get("eos_suppression"), used.eos_suppression),
            "cfg_scale": (options.get("cfg_scale") or 0.0, setup.cfg_scale),
            "response_format": (form and form.key, request.constraint and request.constraint.key),
            "eos_token_id": ([*ends], [*used.eos_token_ids]),
            # These matter at temperature 0 as well: they change confidences.
            **{name: (options.get(name), getattr(used, name)) for name in ("top_p", "top_k")},
        }
        if used.temperature > 0:
            tempered = options.get("tempered_confidence")
            measured = setup.sampling().tempered_confidence if tempered is None else tempered
            found["tempered_confidence"] = measured, used.tempered_confidence
        return found


def _written(cache: Any) -> dict[str, Any]:
    """A cache as it is chosen: its name, and its options but for what changes nothing."""
    kinds = {type(resolve("cache", name, object)): name for name in names("cache")}
    own = {f"cache.{name}": value for name, value in vars(cache).items()}
    if own.get("cache.refresh_above") is None:
        own.pop("cache.measure_every", None)
    return {"cache": kinds.get(type(cache), type(cache).__name__), **own}


def _text(value: Any) -> str:
    return brief(value if isinstance(value, str) else json.dumps(value, default=str))


def _turned(policy: Any, knob: str, value: Any) -> Any:
    """The policy with another value of its knob, or of that of its base (`base.NAME`)."""
    own, _, inner = knob.partition(".")
    if inner:
        value = _turned(resolve("sampler", getattr(policy, own), Sampler, own), inner, value)
    return replace(policy, **{own: value})
