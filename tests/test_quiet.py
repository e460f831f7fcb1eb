"""What transformers says while a model is loaded or a prompt read: nothing, where an error of this package says it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import dllm
from dllm.files import BUNDLED
from models import random_llada, save_folder


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Everything that transformers' loggers say."""
    lines: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listening = Listening()
    logging.getLogger("transformers").addHandler(listening)
    yield lines
    logging.getLogger("transformers").removeHandler(listening)


def test_a_prompt_longer_than_the_tokenizer_says_is_quiet(tmp_path: Path, said: list[str]) -> None:
    made = random_llada(tokenizer=True, max_length=24)
    assert made.tokenizer is not None
    made.tokenizer.model_max_length = 4
    folder = save_folder(made, tmp_path)
    said.clear()
    lm = dllm.load(folder, device="cpu")
    dllm.generate(lm, ["Sam has 3 pens. He buys 5."], gen_length=4)
    with pytest.raises(ValueError, match="the model's context of 24"):
        dllm.generate(lm, ["Sam has 3 pens. He buys 5." * 4], gen_length=4)
    assert said == []


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_guide_whose_weights_would_be_drawn_at_random_is_refused(
    change: str, tmp_path: Path, said: list[str]
) -> None:
    folder = Path(shutil.copytree(BUNDLED / "tiny-guide", tmp_path / "guide"))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights |= {name: weights[name][:-1].clone()}
    if change == "missing":
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"can be loaded: tensor {name} is missing or has another shape"):
        dllm.generate(random_llada(tokenizer=True), ["Sam"], dllm.samplers.ARGuided(str(folder)), gen_length=4)
    assert said == []


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 99}}),
        ("config.json", {"rope_scaling": {"type": "yarn", "factor": 2}}),
        ("config.json", {"mask_token_id": 999}),
        ("tokenizer_config.json", {"bos_token": 5}),
        ("tokenizer_config.json", {"extra_special_tokens": 5}),
    ],
)
def test_a_refusal_to_load_is_all_that_is_said(
    file: str, entries: dict[str, Any], tmp_path: Path, said: list[str]
) -> None:
    folder = save_folder(random_llada(tokenizer=True), tmp_path)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    said.clear()
    with pytest.raises(ValueError, match=str(folder)):
        dllm.load(folder, device="cpu")
    assert said == []
