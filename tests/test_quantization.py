"""Weights that are quantised when they are loaded."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm
from commands import command
from dllm.models import LLaDAModelLM, loading
from models import random_llada, save_folder

INT8 = {"quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}}  # fmt: skip
QUESTION = "Tom has 23 apples. He buys 12. How many apples does he have?"
METHODS = {"torchao": INT8, "quanto": {"quant_method": "quanto", "weights": "int8"}}
methods = pytest.mark.parametrize(
    "method",
    [
        pytest.param(each, id=name, marks=pytest.mark.skipif(find_spec(library) is None, reason=f"needs {library}"))
        for (name, each), library in zip(METHODS.items(), ("torchao", "optimum"), strict=True)
    ],
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "quantization={} is not supported; give {quant_method: ..., ...} with one of awq, bitsandbytes"),
        ({"quant_method": "magic"}, "quantization={'quant_method': 'magic'} is not supported"),
        ({"quant_method": "mxfp4"}, "is not supported"),  # transformers would download its kernels
        ({"quant_method": ["torchao"]}, "is not supported"),
        ("int8", "quantization='int8' is not supported"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": 5}, "cannot be used (load_in_8bit must be a boolean)"),
        ({"quant_method": "quanto", "weights": "int4"}, "weights='int4' are not supported; use int8 or float8"),
        ({"quant_method": "quanto", "weights": ["int8"]}, "weights=['int8'] are not supported"),
    ],
    ids=str,
)
def test_settings_that_are_not_supported_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match="quantization=") as error:
        dllm.load("tiny-llada", device="cpu", quantization=given)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "package"),
    [
        (INT8, "torchao"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq", "nbits": 4}, "hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, "optimum-quanto"),
    ],
    ids=str,
)
def test_a_library_that_is_missing_is_named(given: dict[str, Any], package: str) -> None:
    if find_spec({"optimum-quanto": "optimum"}.get(package, package)) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match="quantization=") as error:
        dllm.load("tiny-llada", device="cpu", quantization=given)
    assert str(error.value).startswith(f"quantization={given!r} needs a library that is not installed (")
    assert f"install {package}, or leave it out" in str(error.value)


def test_settings_reach_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def from_pretrained(folder: Any, **options: Any) -> None:
        seen.update(options)
        raise RuntimeError("no GPU\nmore")

    monkeypatch.setattr(loading.AutoQuantizationConfig, "from_dict", lambda given: ("settings", given))
    monkeypatch.setattr(LLaDAModelLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match=r"^quantization=.* cannot be used here \(no GPU\); leave it out, or use"):
        dllm.load("tiny-llada", device="cpu", quantization=INT8)
    assert seen["quantization_config"] == ("settings", INT8)


def test_what_does_not_go_with_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading.AutoQuantizationConfig, "from_dict", lambda given: given)
    with pytest.raises(ValueError, match="adapter='folder' cannot be merged into weights that quantization changes"):
        dllm.load("tiny-llada", quantization=INT8, adapter="folder")
    with pytest.raises(ValueError, match="quantization is not supported with tp=true"):
        dllm.load("tiny-llada", quantization=INT8, tp=True)
    folder = save_folder(random_llada(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": INT8}))
    with pytest.raises(
        ValueError, match=r"^quantization has no effect on .*, whose weights are quantised with torchao"
    ):
        dllm.load(folder, quantization=INT8)


@pytest.mark.skipif(find_spec("optimum") is None, reason="needs optimum")
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("modules_to_not_convert", ["([a-z_.0-9]+)+!"], "take more than 0.2 seconds to match the names of the modules"),
        ("modules_to_not_convert", ["("], "a regular expression is invalid: re.error: missing"),
        ("modules_to_not_convert", 5, "modules_to_not_convert=5 is no list of modules"),
        ("modules_to_not_convert", ["a"] * 2000, "is no list of modules"),
        ("ignore", {"re:([a-z_.0-9]+)+!": 1}, "take more than 0.2 seconds to match the names of the modules"),
    ],
)
def test_expressions_of_a_checkpoints_quantiser_are_matched_apart(
    option: str, value: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm.models.expressions._SECONDS", 0.2)
    folder = save_folder(random_llada(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "quanto", "weights": "int8", option: value}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(ValueError, match=said):
        dllm.load(folder, device="cpu")


def test_a_command_says_it_in_one_line() -> None:
    told = command("generate", "model.quantization={quant_method: magic}")
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "error: model.quantization={'quant_method': 'magic'} is not supported; give" in told.err
    told = command("bench", "model.path=random:tiny", "model.quantization={quant_method: torchao}")
    assert told.code == 2 and "model.quantization=" in told.err


@pytest.mark.skipif(find_spec("optimum") is None, reason="needs optimum")
def test_float8_weights_decode() -> None:
    lm = dllm.load("tiny-llada", device="cpu", quantization={"quant_method": "quanto", "weights": "float8"})
    assert lm.backbone.fingerprint() != dllm.load("tiny-llada", device="cpu").backbone.fingerprint()
    assert dllm.generate(lm, QUESTION, "threshold", gen_length=16).stats.tokens > 0


@methods
@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_quantised_weights_answer_like_the_others_and_are_told_apart(
    name: str, method: dict[str, Any], tmp_path: Path
) -> None:
    exact, quantised = dllm.load(name, device="cpu"), dllm.load(name, device="cpu", quantization=method)
    for cache in ("none", "prefix"):
        texts = [dllm.generate(lm, QUESTION, "threshold", cache, gen_length=64).texts for lm in (exact, quantised)]
        assert texts[0] == texts[1]
    ids = torch.tensor([[5, 6, 7, 1, 1]])
    with torch.inference_mode():
        error = (exact.backbone(ids).logits - quantised.backbone(ids).logits).abs().max()
    assert 0 < error < 0.5
    assert exact.backbone.fingerprint() != quantised.backbone.fingerprint()
    assert dllm.load(name, device="cpu", quantization=method).backbone.fingerprint() == quantised.backbone.fingerprint()
    if method["quant_method"] == "torchao":  # transformers cannot save the other
        again = dllm.load(save_folder(quantised, tmp_path), device="cpu")
        assert again.backbone.fingerprint() == quantised.backbone.fingerprint()


@methods
def test_answers_of_other_weights_are_not_continued(method: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": k, "prompt": QUESTION}) + "\n" for k in "ab"))
    given = ["generate", f"input={tmp_path}/in.jsonl", f"output={tmp_path}/out.jsonl", "sampler=threshold"]
    settings = f"model.quantization={json.dumps(method).replace(' ', '').replace(chr(34), '')}"
    assert command(*given, settings).code == 0
    assert command(*given, settings).code == 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text(lines[0])
    told = command(*given)
    assert told.code == 2 and "model.quantization" in told.err
