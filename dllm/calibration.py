"""The card of `dllm calibrate`: the setting of a policy that was certified for a model, and how."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from dllm import identity
from dllm.files import portable, read_json, write_json
from dllm.stored import LATER, misfit, there

FORMAT, VERSION = "dllm-calibration", 1
_FIX = "make it again with dllm calibrate"
# What the fields are that cards of earlier versions do not have.
_ABSENT: dict[str, Any] = {"contents": {}, "score": None, "defaults": None, "dtype": None}


class Tested(TypedDict):
    """The test of a value."""

    value: float | int
    n: int
    mean_loss: float
    p_value: float
    bound: float
    accuracy: float
    nfe: float
    certified: bool


class Defaults(TypedDict):
    """Options as the model has them, where they are left to it."""

    eos_token_id: list[int]
    block_length: int | None  # of a block-causal model


@dataclass(frozen=True)
class Calibration:
    """A card.

    Attributes:
        model: name of the denoiser.
        weights: its fingerprint.
        sampler: the policy: `_target_` and options.
        knob: the option that was calibrated.
        value: the fastest certified value; None if none was.
        cache: the cache, likewise.
        options: decoding options.
        task: name of the task.
        data: what identifies its problems.
        n: problems.
        loss: limit of the risk: the mean loss against one token per step over all problems, where gains do not count;
            of answers that are right or wrong, the share of problems that only one token per step has right.
        delta: probability of a false certificate.
        bound: upper confidence bound on the risk of the chosen value; None without one.
        baseline: accuracy and NFE of one token per step.
        tests: of each value in order: mean loss, p-value, bound, accuracy, NFE, whether it is certified.
        contents: hashes of the files that the policy reads, from `files_of`; none in cards of earlier versions.
        score: name of the score that counts as accuracy; None in cards of earlier versions.
        defaults: what null and auto in `options` stand for; None in cards of earlier versions.
        dtype: of the denoiser, such as "float32"; None in cards of earlier versions.
    """

    model: str
    weights: str
    sampler: dict[str, Any]
    knob: str
    value: float | int | None
    cache: dict[str, Any]
    options: dict[str, Any]
    task: str
    data: dict[str, Any]
    n: int
    loss: float
    delta: float
    bound: float | None
    baseline: dict[str, float]
    tests: list[Tested]
    contents: dict[str, str] = field(default_factory=dict, metadata=LATER)
    score: str | None = field(default=None, metadata=LATER)
    defaults: Defaults | None = field(default=None, metadata=LATER)
    dtype: str | None = field(default=None, metadata=LATER)

    @property
    def guarantee(self) -> str:
        """What is certified of a value, with all digits of `loss` and `delta`."""
        return f"loses at most {self.loss} of the problems with probability 1 - {self.delta}"

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """Read a card.

        Raises:
            ValueError: no such file, or it is damaged or something else.
        """
        if not isinstance(path, (str, Path)):
            raise ValueError(f"calibration={path!r} is not a path; {_FIX}")
        file = Path(path)
        if not there(file, _FIX):
            raise ValueError(f"calibration={str(path)!r} does not exist; {_FIX}")
        found = read_json(file, _FIX)
        if found.pop("format", None) != FORMAT or found.pop("version", None) != VERSION:
            raise ValueError(f"calibration={str(path)!r} is not a card of dllm calibrate; {_FIX}")
        if wrong := misfit(found, cls, "the card") or _contradiction(cls(**found)):
            raise ValueError(f"calibration={str(path)!r} is damaged ({wrong}); {_FIX}")
        return cls(**found)

    def write(self, file: Path, before: Calibration | None = None) -> None:
        """Write the card.

        Args:
            file: of the card.
            before: the card that is there; one that only lacks what earlier versions did not write is kept, since runs
                know it by its content.
        """
        own = asdict(self)
        if before is not None:
            known = asdict(before)
            missing = {name: none for name, none in _ABSENT.items() if known[name] == none}
            if known == json.loads(json.dumps(own | missing)):
                return
        fields = {name: value for name, value in own.items() if _ABSENT.get(name, ...) != value}
        write_json(file, {"format": FORMAT, "version": VERSION, **fields})

    def check(self, fingerprint: str) -> None:
        """Reject another model.

        Raises:
            ValueError: the card is of another model.
        """
        if fingerprint != self.weights:
            raise ValueError(
                f"calibration is of {self.model} with weights {self.weights}, and this model has {fingerprint}; "
                "calibrate this model with dllm calibrate"
            )

    def compared_score(self, name: str) -> dict[str, tuple[str, str]]:
        """The score on the card, and another one; nothing if the card does not say."""
        return {} if self.score is None else {"task.metric": (self.score, name)}

    def compared_dtype(self, dtype: str | None) -> dict[str, tuple[str, str]]:
        """The precision on the card, and another one; nothing if one of them is unknown."""
        return {} if self.dtype is None or dtype is None else {"model.dtype": (self.dtype, dtype)}

    def compared_defaults(self, defaults: Defaults | None) -> dict[str, tuple[Any, Any]]:
        """What null and auto stand for on the card, and for another model; nothing if one of them does not say."""
        if self.defaults is None or defaults is None:
            return {}
        return {
            "eos_token_id of the model": (self.defaults["eos_token_id"], defaults["eos_token_id"]),
            "block_length of the model": (self.defaults["block_length"], defaults["block_length"]),
        }

    def compared(self, policy: Any) -> dict[str, tuple[str, str]]:
        """The hash of each file on the card, and that of the same file now; a moved file is the same.

        Args:
            policy: with the options of the card.
        """
        now = files_of(policy) if self.contents else {}
        found = {}
        for name, made in self.contents.items():
            moved = name not in now and made in now.values()
            found[name] = made, made if moved else now.get(name, "another file")
        return found


def _contradiction(card: Calibration) -> str | None:
    """What is inconsistent on a card; None if nothing is."""
    if not (0 < card.loss < 1 and 0 < card.delta < 1 and card.n > 0):
        return f"loss={card.loss}, delta={card.delta} or n={card.n} is out of range"
    for test in card.tests:
        if test["certified"] and not (test["p_value"] <= card.delta and test["bound"] <= card.loss):
            return f"{card.knob}={test['value']} is certified, with p_value={test['p_value']} and bound={test['bound']}"
    if card.value is None:
        return None
    tests = [test for test in card.tests if test["value"] == card.value and test["certified"]]
    if not tests:
        return f"none of its tests certifies {card.knob}={card.value}"
    if all(test["bound"] != card.bound for test in tests):
        return f"bound={card.bound} differs from the bound of the test of {card.knob}={card.value}"
    return None


def files_of(policy: Any) -> dict[str, str]:
    """A hash of every file that a policy reads, by its path, or for bundled ones that below the package.

    Raises:
        OSError: one cannot be read.
    """
    return {portable(Path(path)): content[:16] for path, content in identity.read_by(policy).items()}
