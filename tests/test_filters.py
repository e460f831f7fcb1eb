"""Filters on disk, and what their two forms can and cannot see."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dllm
from dllm.filters import (
    ConfidenceFilter,
    Filter,
    FilterCard,
    FilterNetwork,
    NeighbourFilter,
    bundled_filters,
    filter_files,
    find_filter,
    load_filter,
)
from models import random_filter

CARD = FilterCard("neighbours", 8, "m", "0123", {"a": 1}, {"b": None}, "data", 5, 6, {"x": 1}, {"y": 0.5}, [{"z": 1.0}])
PUBLISHED = replace(CARD, architecture="published")


def shown(width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    confidence = torch.rand((3, width), generator=draw)
    return confidence, torch.rand((3, width), generator=draw) > 0.5, torch.ones(3, width, dtype=torch.bool)


@pytest.mark.parametrize("network", [NeighbourFilter(5, 2), ConfidenceFilter(8), ConfidenceFilter(8, 3)], ids=repr)
def test_what_is_saved_is_what_loads(network: FilterNetwork, tmp_path: Path) -> None:
    card = replace(CARD, architecture=network.architecture)
    Filter(network, card, "x").save(tmp_path / "new" / "f.safetensors")
    found = load_filter(tmp_path / "new" / "f.safetensors")
    assert found.card == card
    assert torch.equal(found.network(*shown()), network.eval()(*shown()))


def test_the_same_filter_has_the_same_bytes(tmp_path: Path) -> None:
    own = Filter(NeighbourFilter(5, 2), CARD, "x")
    found = set()
    for number in range(10):
        own.save(tmp_path / f"{number}.safetensors")
        found.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(found) == 1


def test_a_bare_file_in_the_published_form_loads_without_a_card(tmp_path: Path) -> None:
    save_file(ConfidenceFilter(32).state_dict(), tmp_path / "f.safetensors")
    found = load_filter(str(tmp_path / "f.safetensors"))
    assert found.card is None
    assert found.network.block_length == 32
    assert sum(p.numel() for p in found.network.parameters()) == 2112


def test_the_published_form_is_its_two_layers() -> None:
    network = ConfidenceFilter(8)
    confidence, masked, inside = shown()
    inside[:, 6:] = False
    seen = torch.where(inside, confidence, 1.0)
    wanted = (seen @ network.fc1.weight.T + network.fc1.bias).relu() @ network.fc2.weight.T + network.fc2.bias
    torch.testing.assert_close(network(confidence, masked, inside), wanted)


def test_neighbours_beyond_a_short_block_are_as_good_as_none() -> None:
    network = random_filter().network
    confidence, masked, inside = shown(12)
    inside[:, 7:] = False
    short = network(confidence[:, :7], masked[:, :7], inside[:, :7])
    torch.testing.assert_close(network(confidence, masked, inside)[:, :7], short)


def test_a_neighbour_filter_sees_its_neighbours_and_no_further() -> None:
    network = random_filter().network
    confidence, masked, inside = shown(24)
    moved = confidence.clone()
    moved[:, 20] = 1 - moved[:, 20]
    changed = (network(confidence, masked, inside) != network(moved, masked, inside)).any(0)
    assert changed[20]
    assert not changed[:14].any()


def test_sure_and_nearly_sure_are_told_apart() -> None:
    network = random_filter().network
    inside = torch.ones(1, 1, dtype=torch.bool)
    at = [network(torch.tensor([[c]]), inside, inside).item() for c in (0.99, 0.9999, 0.999999, 1.0)]
    assert len(set(at)) == 4
    assert all(abs(value) < 1e4 for value in at)


class TestBundled:
    @pytest.mark.parametrize("kind", [None, "anchored"])
    @pytest.mark.parametrize("model", ["tiny-llada", "tiny-dream"])
    def test_the_card_is_about_the_model_it_comes_with(self, model: str, kind: str | None) -> None:
        name = model if kind is None else f"{model}/{kind}"
        found = load_filter(name)
        assert found.card is not None
        assert found.card.fingerprint == dllm.load(model, device="cpu").backbone.fingerprint()
        assert (found.card.block_length, found.card.backbone) == (32, model)
        assert found.card.sampler["order"] == ("low_confidence" if kind is None else "left_to_right")
        assert find_filter(found.card.fingerprint, 32, kind).name == name
        assert found.card.held_out["recall_at_0.999"] > 0.5
        precise = {row["threshold"]: row["precision"] for row in found.card.held_out["thresholds"]}
        assert precise[0.99] > 0.998

    def test_there_is_one_of_each_kind_for_each_denoiser(self) -> None:
        assert bundled_filters() == ["tiny-dream", "tiny-llada", "tiny-dream/anchored", "tiny-llada/anchored"]
        assert {file.name for file in filter_files("anchored")} == {"anchored.safetensors", "anchored.json"}
        with pytest.raises(ValueError, match=r"filter=anchored: there is no bundled .* sampler.order=left_to_right"):
            find_filter("of another model", 32, "anchored")


class TestDamage:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        Filter(ConfidenceFilter(8), PUBLISHED, "x").save(tmp_path / "f.safetensors")
        return tmp_path / "f.safetensors"

    def refused(self, file: Path, why: str) -> None:
        with pytest.raises(ValueError, match=why) as caught:
            load_filter(file)
        assert "\n" not in str(caught.value)

    def test_a_file_cut_short(self, file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-10])
        self.refused(file, "is damaged: .*; make it again")

    def test_tensors_of_something_else(self, file: Path) -> None:
        save_file({"weight": torch.zeros(3, 3)}, file)
        self.refused(file, r"is not a filter: it must hold fc1.weight, .* or conv1.weight, .*; give")

    def test_one_tensor_too_many(self, file: Path) -> None:
        save_file(load_file(file) | {"fc3.bias": torch.zeros(3)}, file)
        self.refused(file, "is not a filter")

    def test_tensors_that_do_not_fit_together(self, file: Path) -> None:
        save_file(load_file(file) | {"fc2.bias": torch.zeros(3)}, file)
        self.refused(file, "its tensors do not fit together")

    @pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 100_000, json.dumps(asdict(CARD) | {"more": 1})])
    def test_a_card_that_is_none(self, file: Path, text: str) -> None:
        file.with_suffix(".json").write_text(text)
        self.refused(file, "f.json is not a card of a filter .*; make it again, or remove it")

    @pytest.mark.parametrize(
        "entries",
        [
            {"architecture": "neighbours"}, {"architecture": 5}, {"block_length": 16}, {"block_length": "8"},
            {"block_length": 8.0}, {"block_length": True}, {"block_length": None}, {"fingerprint": 5},
            {"cache": []}, {"held_out": None}, {"calibration": {}}, {"prompts": "5"}, {"seed": False},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_card_at_odds_with_the_tensors_or_itself(self, file: Path, entries: dict[str, Any]) -> None:
        file.with_suffix(".json").write_text(json.dumps(asdict(PUBLISHED) | entries))
        self.refused(file, rf"f.json is not a card of a filter \({next(iter(entries))}")

    def test_the_card_of_another_filter(self, file: Path) -> None:
        Filter(NeighbourFilter(5, 2), CARD, "x").save(file)
        assert load_filter(file).card == CARD
        file.with_suffix(".json").write_text(json.dumps(asdict(replace(CARD, fingerprint="4567"))))
        self.refused(file, "has the card of another filter")

    def test_a_card_of_no_length(self, file: Path) -> None:
        Filter(NeighbourFilter(5, 2), replace(CARD, block_length=0), "x").save(file)
        self.refused(file, "block_length=0 is not a valid length")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
    @pytest.mark.parametrize("name", ["fc1.weight", "fc2.bias"])
    def test_values_that_are_no_numbers(self, file: Path, name: str, value: float) -> None:
        tensors = {key: tensor.double() for key, tensor in load_file(file).items()}
        tensors[name][-1] = value
        save_file(tensors, file)
        self.refused(file, f"{name} holds NaN or infinity")

    @pytest.mark.parametrize(
        "dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2], ids=str
    )
    def test_tensors_of_no_real_numbers(self, file: Path, dtype: torch.dtype) -> None:
        save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
        self.refused(file, "fc1.bias is .*, not floating-point numbers")

    @pytest.mark.parametrize(
        ("shapes", "why"),
        [
            (((8, 8), (8,), (9, 8), (9,)), "do not fit together"),
            (((8, 7), (8,), (8, 8), (8,)), "do not fit together"),
            (((8, 8), (7,), (8, 8), (8,)), "do not fit together"),
            (((8, 8), (8,), (8, 7), (8,)), "do not fit together"),
            (((0, 8), (0,), (8, 0), (8,)), "a width is not from 1 to 16384"),
            (((8, 0), (8,), (0, 8), (0,)), "a width is not from 1 to 16384"),
            (((20_000, 1), (20_000,), (1, 20_000), (1,)), "a width is not from 1 to 16384"),
        ],
    )
    def test_sizes_of_no_filter(self, file: Path, shapes: tuple[tuple[int, ...], ...], why: str) -> None:
        names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        save_file({name: torch.zeros(shape) for name, shape in zip(names, shapes, strict=True)}, file)
        self.refused(file, why)

    def test_an_even_convolution_has_no_middle(self, file: Path) -> None:
        tensors = NeighbourFilter(5, 2).state_dict()
        tensors |= {name: tensors[name][..., :4].contiguous() for name in ("conv1.weight", "conv2.weight")}
        save_file(tensors, file)
        self.refused(file, "do not fit together")
