"""A policy with the setting that `dllm calibrate` certified, for the model it was certified for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dllm.calibration import Calibration
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.resolve import CALIBRATION, build
from dllm.samplers.base import Denoise, Sampler


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

    def __post_init__(self) -> None:
        card = Calibration.read(self.calibration)
        if card.value is None:
            raise ValueError(
                f"calibration={str(self.calibration)!r} certifies no {card.knob}: none lost at most {card.loss:g} with "
                f"probability {1 - card.delta:g}; calibrate with safer values, more problems or a larger loss"
            )
        try:
            if CALIBRATION in card.sampler:
                raise ValueError("it names another card")
            own: Any = build("sampler", {**card.sampler, card.knob: card.value}, Sampler)
        except ValueError as error:
            raise ValueError(
                f"calibration={str(self.calibration)!r} is damaged ({error}); make it again with dllm calibrate"
            ) from None
        if self.base is not None:
            given: Any = self.base
            if type(given) is not type(own) or replace(given, **{card.knob: card.value}) != own:
                raise ValueError(
                    f"calibration={str(self.calibration)!r} is of {card.sampler}; use this policy with these options"
                )
        object.__setattr__(self, "card", card)
        object.__setattr__(self, "policy", own)

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

    def start(self, setup: Setup) -> Any:
        """Reject another model, and start the policy."""
        self.card.check(setup.fingerprint())
        return self.policy.start(setup)

    def check(self, state: Any, request: Request) -> None:
        """As the policy."""
        self.policy.check(state, request)

    def enter(self, state: Any, row: int, request: Request) -> None:
        """As the policy."""
        self.policy.enter(state, row, request)

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """One step of the policy."""
        return self.policy.step(window, denoise, state)
