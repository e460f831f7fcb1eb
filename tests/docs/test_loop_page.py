"""The page that follows one token says what the bundled model does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dllm
from dllm.decoding.prediction import Prediction
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise

PAGE = (Path(__file__).parents[2] / "docs" / "loop.md").read_text()
QUESTION = "Tom has 23 apples. He buys 12. How many apples does he have?"
SETTING: dict[str, Any] = {"cache": "dual", "gen_length": 32, "block_length": 16}
POSITION = 26
PREDICTIONS: list[tuple[int, float]] = []


@dataclass(frozen=True)
class Watched(dllm.samplers.Threshold):
    """The threshold, noting what is predicted at the position that the page follows."""

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """Note the prediction."""
        seen: list[Prediction] = []

        def noting(*args: Any, **kwargs: Any) -> Prediction:
            seen.append(denoise(*args, **kwargs))
            return seen[-1]

        edit = super().step(window, noting, state)  # type: ignore[arg-type]  # a Denoise is a protocol of attributes, too
        at = POSITION - int(window.columns[0, 0])
        if at >= 0 and bool(window.masked[0, at]):
            PREDICTIONS.append((int(seen[0].tokens[0, at]), float(seen[0].confidence[0, at])))
        return edit


def test_the_table_is_what_the_bundled_model_does() -> None:
    lm = dllm.load("tiny-llada")
    PREDICTIONS.clear()
    prompt = len(lm.tokenizer(QUESTION)["input_ids"])
    rows = []
    for step, frame in enumerate(dllm.stream(lm, QUESTION, sampler=Watched(0.9), **SETTING)):
        prediction = ["", "", ""]
        if len(PREDICTIONS) > step:
            token, confidence = PREDICTIONS[step]
            written = "yes" if bool(frame.committed[0, POSITION]) else "no"
            prediction = [f"`{lm.tokenizer.decode([token])}`", f"{confidence:.3f}", written]
        tokens = frame.tokens[0, prompt : prompt + 17 if step == 7 else prompt + 16].tolist()
        text = lm.tokenizer.decode(tokens).replace("<|mdm_mask|>", "▢")
        rows.append([str(step), *prediction, text])
    told = re.findall(r"^\| \d.*", PAGE, re.MULTILINE)
    assert rows == [[cell.strip() for cell in line.strip("|").split("|")] for line in told]


def test_the_figures_are_those_of_the_run() -> None:
    page = " ".join(PAGE.split())
    lm = dllm.load("tiny-llada")
    out = dllm.generate(lm, QUESTION, sampler="threshold", **SETTING)
    stats = out.stats
    assert f"{int(out.nfe)} forwards (NFE) for {stats.tokens} tokens" in page
    assert f"{stats.tpf:.2f} tokens per forward (TPF)" in page
    assert f"{stats.computed_columns} positions were computed" in page
    better = dllm.generate(lm, QUESTION, sampler="tiny/threshold", **SETTING)
    assert f'takes {int(better.nfe)} forwards and reads "{better.texts[0]}"' in page
