"""Learn2PD: what the filter is shown, what its verdict commits, where end-of-text prediction cuts."""

from __future__ import annotations

import warnings
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dllm
from dllm.checks import Notice
from dllm.decoding.prediction import Prediction, Sampling
from dllm.filters import ConfidenceFilter, Filter, FilterCard, NeighbourFilter
from dllm.resolve import build
from dllm.samplers import Learn2PD
from dllm.samplers.base import Sampler
from models import random_dream, random_filter, random_llada
from sampler_rig import MASK, chosen, facts, request, window

EOS = 98
CARD = FilterCard("neighbours", 8, "some-model", "0123", {}, {}, "", 1, 0, {}, {}, [])


def rising(block_length: int, at: float = 0.8) -> Filter:
    """A filter in the published form that judges each position by its own confidence: surer than 1/2 above `at`."""
    network = ConfidenceFilter(block_length)
    with torch.no_grad():
        network.fc1.weight.copy_(torch.eye(block_length))
        network.fc2.weight.copy_(20 * torch.eye(block_length))
        network.fc1.bias.zero_()
        network.fc2.bias.fill_(-20 * at)
    return Filter(network, None, "rising")


def flat(block_length: int) -> Filter:
    """A filter that gives everything a probability of exactly 1/2."""
    network = ConfidenceFilter(block_length)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    return Filter(network, None, "flat")


class Spy(NeighbourFilter):
    """Remembers what it was shown, and accepts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, confidence: Tensor, masked: Tensor, inside: Tensor) -> Tensor:
        """See `NeighbourFilter`."""
        self.shown.append((confidence, masked, inside))
        return torch.full_like(confidence, -9.0)


class TestRule:
    def test_what_the_filter_accepts_is_committed(self) -> None:
        sampler = Learn2PD(rising(5), 0.5, allow_mismatch=True)
        assert chosen(sampler, [0.9, 0.7, 0.85, 0.1, 0.79]) == [0, 2]

    def test_a_higher_threshold_asks_for_more(self) -> None:
        sampler = Learn2PD(rising(5), 0.95, allow_mismatch=True)
        assert chosen(sampler, [0.96, 0.7, 0.85, 0.1, 0.79]) == [0]

    def test_the_threshold_itself_is_not_enough(self) -> None:
        assert chosen(Learn2PD(flat(4), 0.5, allow_mismatch=True), [0.5, 0.6, 0.7, 0.6]) == [2]
        assert chosen(Learn2PD(flat(4), 0.49, allow_mismatch=True), [0.5, 0.6, 0.7, 0.6]) == [0, 1, 2, 3]

    def test_the_surest_go_in_any_case_the_leftmost_of_equals_first(self) -> None:
        assert chosen(Learn2PD(flat(4), 1.0, at_least=2, allow_mismatch=True), [0.5, 0.6, 0.6, 0.6]) == [1, 2]

    def test_decoded_positions_are_not_committed_again(self) -> None:
        sampler = Learn2PD(Filter(Spy(), None, "spy"), 0.0, at_least=9, allow_mismatch=True)
        assert chosen(sampler, [0.5, nan, 0.6]) == [0, 2]


@pytest.mark.parametrize("length", [16, None])
def test_a_canvas_shorter_than_the_block_is_a_short_block(length: int | None) -> None:
    lm = random_llada(max_length=64, dtype=torch.float64)
    sampler = Learn2PD(random_filter(1, length), threshold=0.5, allow_mismatch=True)
    short, long = [5, 6], [*range(4, 44)]
    asked = {"gen_length": 8, "block_length": 16, "seed": 0}
    alone = dllm.generate(lm, [short], sampler, **asked)
    beside = dllm.generate(lm, [short, long], sampler, **asked)
    assert alone.completions[0].tolist() == beside.completions[0].tolist()
    assert alone.nfe[0] == beside.nfe[0] < 8


@pytest.mark.parametrize("make", [random_llada, random_dream])
def test_the_filter_sees_the_whole_block_as_the_model_would_predict_it_now(make: Any) -> None:
    lm, spy = make(), Spy()
    sampler = Learn2PD(Filter(spy, None, "spy"), allow_mismatch=True)
    frames = list(dllm.stream(lm, [[3, 4, 5]], sampler, gen_length=6, block_length=4, stop_at_eos=False))
    assert len(spy.shown) == len(frames) == 6
    canvas = torch.tensor([[3, 4, 5, *[lm.backbone.mask_token_id] * 6]])
    for (confidence, masked, inside), frame in zip(spy.shown, frames, strict=True):
        start = 3 if (canvas[:, 3:7] == lm.backbone.mask_token_id).any() else 7
        with torch.no_grad():
            logits = lm.backbone(canvas).logits[0]
        logits = logits.roll(lm.backbone.logits_shift, 0)
        predicted = logits.index_fill(-1, torch.tensor([lm.backbone.mask_token_id]), -torch.inf).argmax(-1)
        wanted = logits.softmax(-1).gather(-1, predicted[:, None])[:, 0]
        width = min(4, 9 - start)
        torch.testing.assert_close(confidence[0, :width].double(), wanted[start : start + width], atol=1e-6, rtol=0)
        assert inside[0].tolist() == [True] * width + [False] * (4 - width)
        assert masked[0, :width].tolist() == (canvas[0, start : start + width] == lm.backbone.mask_token_id).tolist()
        canvas = frame.tokens


def end(
    sampler: Learn2PD, predicted: dict[int, tuple[int, float]], decoded: dict[int, int] | None = None, given: int = 20
) -> int:
    """Where one step over columns 4 to 11 of 20 ends the row, given predictions (token, confidence) by column.

    Elsewhere token 1 is predicted with confidence 0.3. `decoded` holds tokens by column; from `given` on all are given.
    """
    tokens = torch.full((1, 20), MASK)
    for column, token in (decoded or {}).items():
        tokens[0, column] = token
    view = window(tokens[0, 4:12] == MASK)
    view = replace(view, tokens=tokens, region=(torch.arange(20) >= 4)[None] & (torch.arange(20) < given)[None])

    def denoise(*args: Any, decided: bool = False) -> Any:
        asked, columns = args or (view.inside if decided else view.masked, view.columns)
        logits = []
        for column in columns[asked].tolist():
            token, confidence = predicted.get(column, (1, 0.3))
            row = torch.full((200,), (1 - confidence) / 199, dtype=torch.float64)
            row[token] = confidence
            logits.append(row.log())
        return Prediction(torch.stack(logits), asked, asked.flatten().nonzero()[:, 0], MASK, Sampling())

    state = sampler.start(facts())
    sampler.check(state, request())
    edit = sampler.step(view, denoise, state)
    assert edit.end is not None
    return int(edit.end[0])


class TestEndOfText:
    PUBLISHED = Learn2PD(rising(8), 0.5, "published", allow_mismatch=True)
    ACCEPTED = Learn2PD(rising(8), 0.5, "accepted", allow_mismatch=True)
    SAFE = Learn2PD(rising(8), 0.5, "safe", allow_mismatch=True)

    def test_published_cuts_behind_the_first_accepted_in_the_block(self) -> None:
        assert end(self.PUBLISHED, {6: (EOS, 0.9), 5: (EOS, 0.5), 8: (EOS, 0.99), 15: (EOS, 0.999)}) == 7

    def test_else_behind_the_surest_of_the_whole_canvas(self) -> None:
        assert end(self.PUBLISHED, {9: (EOS, 0.5), 15: (EOS, 0.79), 17: (EOS, 0.6)}) == 16

    def test_an_end_of_text_that_is_decoded_or_given_is_no_prediction(self) -> None:
        assert end(self.PUBLISHED, {9: (EOS, 0.5), 15: (EOS, 0.79)}, decoded={15: 3}) == 10
        assert end(self.PUBLISHED, {9: (EOS, 0.5), 15: (EOS, 0.79)}, given=15) == 10

    def test_accepted_cuts_behind_the_first_accepted_in_the_block_and_nowhere_else(self) -> None:
        assert end(self.ACCEPTED, {6: (EOS, 0.9), 5: (EOS, 0.5), 8: (EOS, 0.99), 15: (EOS, 0.999)}) == 7
        assert end(self.ACCEPTED, {9: (EOS, 0.5), 15: (EOS, 0.79)}) == 20

    @pytest.mark.parametrize("sampler", [PUBLISHED, ACCEPTED, SAFE], ids=["published", "accepted", "safe"])
    def test_without_one_nothing_is_cut(self, sampler: Learn2PD) -> None:
        assert end(sampler, {6: (7, 0.9)}) == 20

    def test_safe_cuts_at_the_first_mask_that_is_left(self) -> None:
        assert end(self.SAFE, {4: (7, 0.9), 5: (EOS, 0.5)}, decoded={6: 3}) == 6

    def test_safe_does_not_cut_behind_an_undecided_position(self) -> None:
        assert end(self.SAFE, {5: (EOS, 0.9), 6: (EOS, 0.5)}) == 20

    def test_safe_does_not_cut_where_the_block_is_done(self) -> None:
        assert end(self.SAFE, dict.fromkeys(range(4, 12), (7, 0.9)) | {12: (EOS, 0.99)}) == 20

    def test_what_is_cut_off_counts_as_never_decoded_and_saves_forwards(self) -> None:
        lm = random_llada()
        options: dict[str, Any] = {"gen_length": 24, "block_length": 8, "stop_at_eos": False}
        lm.backbone.get_output_embeddings().weight.data[62] *= 2  # more of end-of-text
        off = Learn2PD(random_filter(), 0.8, allow_mismatch=True)
        whole, cut = (dllm.generate(lm, [[3, 4]], s, **options) for s in (off, replace(off, eotp="published")))
        filled = cut.commit_step[0] == -1
        assert filled.any()
        assert (cut.completions[0][filled] == lm.backbone.eos_token_ids[0]).all()
        assert filled.tolist() == sorted(filled.tolist())  # one run to the end
        assert cut.nfe[0] < whole.nfe[0]


class TestRefusals:
    def run(self, sampler: Learn2PD, **options: Any) -> None:
        dllm.generate(random_llada(), [[3]], sampler, **{"gen_length": 8, "block_length": 8} | options)

    def test_no_bundled_filter_for_this_model(self) -> None:
        with pytest.raises(
            ValueError, match=r"filter=null: there is no bundled filter .*block_length=8; .*train-filter"
        ):
            self.run(Learn2PD())

    def test_another_model(self) -> None:
        with pytest.raises(ValueError, match=r"filter='x' is for the weights of 'some-model'; .*allow_mismatch=true"):
            self.run(Learn2PD(Filter(NeighbourFilter(), CARD, "x")))

    def test_another_block_length(self) -> None:
        card = replace(CARD, fingerprint=random_llada().backbone.fingerprint(), block_length=16)
        found = Filter(NeighbourFilter(), card, "x")
        with pytest.raises(ValueError, match=r"filter='x' is for block_length=16, not 8; .*allow_mismatch=true"):
            self.run(Learn2PD(found))
        self.run(Learn2PD(found), block_length=16)
        self.run(Learn2PD(found, allow_mismatch=True))

    def test_a_file_that_does_not_say_what_it_is_for(self) -> None:
        with pytest.raises(ValueError, match=r"does not record its model; .*allow_mismatch=true"):
            self.run(Learn2PD(Filter(NeighbourFilter(), None, "x")))

    def test_a_bare_file_of_the_published_form_is_used_with_a_warning(self, tmp_path: Path) -> None:
        network = random_filter(block_length=8).network
        save_file(network.state_dict(), tmp_path / "bare.safetensors")
        message = r"filter='.*bare.safetensors' has no card: it fits block_length=8, its model is unknown"
        with pytest.warns(Notice, match=message):
            self.run(Learn2PD(str(tmp_path / "bare.safetensors")))
        with pytest.raises(ValueError, match=r"fits block_length=8 only, not 4; set block_length=8"):
            self.run(Learn2PD(str(tmp_path / "bare.safetensors")), block_length=4)

    def test_the_published_form_with_a_card_of_another_model_is_refused_as_any_other(self) -> None:
        found = Filter(ConfidenceFilter(8), replace(CARD, architecture="published"), "x")
        with pytest.raises(ValueError, match=r"filter='x' is for the weights of 'some-model'; .*allow_mismatch=true"):
            self.run(Learn2PD(found))

    def test_whoever_allows_a_mismatch_is_not_warned(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.run(Learn2PD(random_filter(block_length=8), allow_mismatch=True))

    def test_the_published_form_cannot_be_used_at_another_block_length_at_all(self) -> None:
        with pytest.raises(ValueError, match="fits block_length=16 only, not 8"):
            self.run(Learn2PD(random_filter(block_length=16), allow_mismatch=True))

    @pytest.mark.parametrize("name", ["filter.pt", "no-such-filter", "/no/such.safetensors"])
    def test_what_is_no_filter_file(self, name: str) -> None:
        with pytest.raises(
            ValueError, match=r"is not a bundled filter .*tiny-llada/anchored \(pickled filters are not"
        ):
            self.run(Learn2PD(name))

    def test_a_pickle_is_never_read(self, tmp_path: Path) -> None:
        torch.save(ConfidenceFilter(8).state_dict(), tmp_path / "filter.pth")
        (tmp_path / "filter.pth").rename(tmp_path / "filter.safetensors")
        with pytest.raises(ValueError, match="is damaged"):
            self.run(Learn2PD(str(tmp_path / "filter.safetensors")))

    @pytest.mark.parametrize("eotp", ["published", "safe"])
    def test_cutting_off_text_that_is_given(self, eotp: Any) -> None:
        lm = random_llada()
        m = lm.backbone.mask_token_id
        with pytest.raises(ValueError, match=f"eotp={eotp} would discard given text; use eotp=off"):
            dllm.infill(lm, [[3, m, m, 4]], Learn2PD(random_filter(), eotp=eotp, allow_mismatch=True))

    @pytest.mark.parametrize(
        ("name", "value"),
        [("threshold", 1.1), ("threshold", -0.1), ("eotp", "on"), ("at_least", 0), ("allow_mismatch", "yes")],
    )
    def test_values_out_of_range_are_named(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=rf"{name}=.*(use|expected) "):
            Learn2PD(**{name: value})


@pytest.mark.parametrize("wrong", [5, 0.5, True, ["tiny-llada"]])
def test_what_is_no_filter_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="is not a filter; give its file or name"):
        Learn2PD(wrong)
    nested = {"_target_": "dllm.samplers.Learn2PD", "filter": wrong}
    with pytest.raises(ValueError, match="is not a filter"):
        build("sampler", {"_target_": "dllm.samplers.Anchored", "base": nested}, Sampler)
