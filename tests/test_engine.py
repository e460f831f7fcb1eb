"""The open engine: requests come, go and are given up at any time, and nothing else changes."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dllm
from commands import in_a_process
from contract_rig import BACKBONES, BY_NAME, PROMPTS
from dllm.checks import Notice
from dllm.decoding import graphs
from dllm.decoding.compatibility import unmet
from dllm.decoding.window import Edit, Window
from dllm.evaluation.likelihood import Estimate, loglikelihood
from dllm.resolve import names
from dllm.samplers import SSD, FreeDave, Vanilla, Wino
from dllm.samplers.base import Denoise, Policy, commit
from dllm.samplers.selection import top
from engine_rig import waiting_engine
from models import random_diffusion_gemma, random_dream, random_llada, random_llada2
from toys import Device, Editing, Leftmost, Revoking, Stalling

SAMPLERS: dict[str, Any] = {
    **BY_NAME, "freedave": FreeDave(3), "freedave-random": FreeDave(12, Vanilla(order="random")),
    "ssd-drawn": SSD(3, Vanilla(alg_temp=1.0)), "wino": Wino(0.2, 0.6, 2),
    "revoking": Revoking(), "editing": Editing(),
}  # fmt: skip
# One set of options for each request of a mixture.
MIXTURE: list[dict[str, Any]] = [
    {"gen_length": 10, "block_length": 4},
    {"gen_length": 3, "block_length": None},
    {"gen_length": 13, "block_length": 4, "temperature": 0.7, "top_k": 20},
    {"gen_length": 8, "block_length": 4, "temperature": 1.5, "top_p": 0.9},
    {"gen_length": 10, "block_length": 6, "eos_token_id": [5, 9], "eos_suppression": "both"},
    {"gen_length": 9, "block_length": 2, "stop_at_eos": False},
]


def finished(engine: dllm.Engine) -> dict[int, dllm.Answer]:
    """All answers from here on."""
    return {event.id: event.answer for step in engine.steps() for event in step if event.answer is not None}


def alike(one: dllm.Answer, other: dllm.Answer) -> bool:
    """Whether two answers are the same but for their numbers and times."""
    untimed = ("completion", "tokens", "nfe", "guide_nfe", "error", "commit_step", "positions", "refreshes", "canvas")
    return all(getattr(one, name) == getattr(other, name) for name in untimed)


def combinations() -> list[Any]:
    """Samplers with caches over the families, each of which meets both others in turn.

    A few samplers meet every cache, the others every fourth one: in batches each meets all (test_caches).
    """
    demanding = ("vanilla", "learn2pd", "freedave", "revoking")
    return [
        pytest.param(sampler, cache, list(BACKBONES.values())[(row + column) % 2], id=f"{first}-{cache}")
        for row, (first, sampler) in enumerate(SAMPLERS.items())
        for column, cache in enumerate(names("cache"))
        if not unmet(sampler, dllm.resolve.resolve("cache", cache, object))
        if first in demanding or (row + column) % 4 == 0
    ]


@pytest.mark.parametrize(("sampler", "cache", "make"), combinations())
def test_a_request_does_not_depend_on_when_it_came_and_beside_whom(
    sampler: Any, cache: str, make: Callable[..., dllm.LanguageModel]
) -> None:
    lm, draw = make(), random.Random(cache)
    fixed = getattr(sampler, "filter", None) is not None  # for blocks of one length
    options = [each | {"seed": n} | ({"block_length": 4} if fixed else {}) for n, each in enumerate(MIXTURE)]
    engine = dllm.Engine(lm, sampler, cache, batch_size=3, max_length=32)
    expected = []
    for prompt, own in zip(PROMPTS, options, strict=False):
        alone = dllm.Engine(lm, sampler, cache, batch_size=1, max_length=32)
        alone.add(prompt, **own)
        expected += finished(alone).values()
    order, answers, number, aborted = draw.sample(range(len(options)), len(options)), {}, {}, set()
    while order or engine.busy:
        for _ in range(min(len(order), draw.choice([0, 0, 1, 2]))):
            which = order.pop()
            number[engine.add(PROMPTS[which], **options[which])] = which
            if draw.random() < 0.3:  # somebody who leaves again
                aborted.add(engine.add(PROMPTS[which], **options[which] | {"seed": 77}))
        for event in engine.step():
            if event.id in number:
                prompt = PROMPTS[number[event.id]]
                assert event.frame.tokens[: len(prompt)].tolist() == prompt
            if event.answer is not None:
                answers[event.id] = event.answer
        if aborted and draw.random() < 0.5:
            engine.abort(draw.choice(sorted(aborted)))
    assert set(answers) - aborted == set(number)
    for name, which in number.items():
        assert alike(answers[name], expected[which])


def test_what_add_returns_counts_up_and_an_answer_carries_it() -> None:
    engine = dllm.Engine(random_llada(), "threshold", batch_size=2, max_length=16)
    assert not engine.busy
    assert list(engine.step()) == []
    assert [engine.add(prompt, gen_length=4) for prompt in ([5], [6, 7], [8])] == [0, 1, 2]
    answers = finished(engine)
    assert {name: answer.index for name, answer in answers.items()} == {0: 0, 1: 1, 2: 2}
    expected = dllm.generate(random_llada(), [[5], [6, 7], [8]], "threshold", gen_length=4)
    assert [answers[n].completion for n in range(3)] == expected.completions.tolist()
    assert not engine.busy


def test_texts_chats_tensors_and_masks_are_requests() -> None:
    lm = random_llada(tokenizer=True)
    engine, mask = dllm.Engine(lm, "threshold", max_length=64), lm.backbone.mask_token_id
    ids = lm.tokenizer("Tom has 5 pens.").input_ids
    for prompt in ("Tom has 5 pens.", ids, torch.tensor(ids), np.array(ids), lm.tokenizer("Tom has 5 pens.")):
        engine.add(prompt, gen_length=6)
    engine.add([*ids, 0, 0], attention_mask=[1] * len(ids) + [0, 0], gen_length=6)
    gapped = [*ids[:2], mask, *ids[3:]]
    filled = engine.add(gapped, infill=True)
    answers = finished(engine)
    (text,) = dllm.generate(lm, "Tom has 5 pens.", "threshold", gen_length=6).texts
    assert {answers[n].text for n in range(6)} == {text}
    assert answers[filled].completion == dllm.infill(lm, [gapped], "threshold").sequences[0].tolist()
    with pytest.raises(ValueError, match="prompt contains 2 prompts; add one at a time"):
        engine.add(["Tom", "Ann"])


def test_stop_strings_end_a_request() -> None:
    lm = random_llada(tokenizer=True, seed=3)
    prompt, options = [4, 5], {"gen_length": 18, "block_length": 6, "stop_at_eos": False}
    engine = dllm.Engine(lm, max_length=24)
    free = engine.add(prompt, **options)
    whole = finished(engine)[free]
    assert whole.text is not None
    word = whole.text[4:8]
    stopped = engine.add(prompt, stop=word, **options)
    answer = finished(engine)[stopped]
    assert answer.text == whole.text.partition(word)[0]
    assert answer.nfe < whole.nfe == 18


def test_a_request_may_take_so_many_forwards() -> None:
    engine = dllm.Engine(random_llada(), max_length=16, batch_size=2)
    short, long = engine.add([5], gen_length=8, max_forwards=3), engine.add([5], gen_length=8, max_forwards=8)
    answers = finished(engine)
    assert (answers[short].nfe, answers[short].text, answers[short].tokens) == (3, None, 0)
    assert answers[short].error == "max_forwards=3 is reached with 5 tokens missing"
    assert answers[short].completion.count(63) == 5
    assert (answers[long].nfe, answers[long].error) == (8, None)
    with pytest.raises(ValueError, match="max_forwards=0 is out of range"):
        engine.add([5], max_forwards=0)


def test_a_request_can_be_given_up_wherever_it_is() -> None:
    engine = dllm.Engine(random_llada(), batch_size=2, max_length=16)
    names_ = [engine.add([5 + n], gen_length=6) for n in range(4)]
    engine.step()
    engine.abort(names_[0])  # under way
    engine.abort(names_[3])  # waiting
    assert sorted(event.id for event in engine.step()) == [1, 2]
    answers = finished(engine)
    assert set(answers) == {1, 2}
    engine.abort(1)  # finished
    for unknown in (4, -1, "1", None, 1.0):
        with pytest.raises(ValueError, match=rf"id={unknown!r} is not a request of this engine"):
            engine.abort(unknown)  # type: ignore[arg-type]
    engine.add([5], gen_length=6)
    engine.step()
    engine.abort(4)
    assert not engine.busy
    assert list(engine.step()) == []


def test_what_cannot_be_decoded_is_refused_when_it_is_added() -> None:
    engine = dllm.Engine(random_llada(), dllm.samplers.Vanilla(steps=9), max_length=12)
    with pytest.raises(ValueError, match="steps=9 is out of range"):
        engine.add([5], gen_length=8, block_length=8)
    with pytest.raises(ValueError, match=r"have 13 tokens, and max_length=12; shorten"):
        engine.add([5] * 4, gen_length=9, block_length=3)
    with pytest.raises(ValueError, match="batch_size is an option of the engine"):
        engine.add([5], batch_size=3)
    with pytest.raises(ValueError, match="unknown option 'gen_lenght'"):
        engine.add([5], gen_lenght=3)
    assert not engine.busy
    with pytest.raises(ValueError, match="max_length=10000000 is out of range"):
        dllm.Engine(random_llada(), max_length=10_000_000)


def test_several_threads_add_and_one_steps() -> None:
    lm, found = random_llada(), dict[int, int]()
    engine = dllm.Engine(lm, "threshold", "dual", batch_size=3, max_length=16)

    def add(token: int) -> None:
        for _ in range(5):
            found[engine.add([token], gen_length=6)] = token

    threads = [Thread(target=add, args=(token,)) for token in (5, 6, 7, 8)]
    for thread in threads:
        thread.start()
    answers = {}
    while any(thread.is_alive() for thread in threads) or engine.busy:
        answers |= {event.id: event.answer for event in engine.step() if event.answer is not None}
    assert sorted(found) == list(range(20)) == sorted(answers)
    expected = dllm.generate(lm, [[5], [6], [7], [8]], "threshold", "dual", gen_length=6).completions.tolist()
    assert all(answers[name].completion == expected[token - 5] for name, token in found.items())


@pytest.mark.parametrize("cache", ["none", "dual", "d2cache", "dllm_cache", "sparse", "elastic"])
def test_nothing_grows_over_a_thousand_requests(cache: str) -> None:
    lm = random_llada(layers=1)
    engine = dllm.Engine(lm, dllm.samplers.Threshold(0.0), cache, batch_size=16, max_length=8)

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        return len(tensors), sum(each.nbytes for each in tensors)

    sizes = []
    gc.collect()
    gc.freeze()  # what was there before is not looked at again
    for _ in range(5):
        for n in range(200):
            engine.add([n % 60 + 1], gen_length=4, block_length=4, stop_at_eos=False)
        assert len(finished(engine)) == 200
        sizes.append(held())
    assert len(set(sizes[1:])) == 1


def test_what_is_kept_of_a_step_does_not_change() -> None:
    engine = waiting_engine(random_llada(), PROMPTS, "threshold", "dual", gen_length=9, block_length=4, batch_size=3)
    kept, seen = [], []
    for step in engine.steps():
        kept.append(step)
        seen.append((step.tokens.copy(), step.nfe.copy(), step.change.committed.copy()))
        if len(kept) % 2:  # half of them are looked at late
            seen[-1] += (step.predicted.copy(), step.recomputed.copy())
    for step, (tokens, nfe, committed, *more) in zip(kept, seen, strict=True):
        assert np.array_equal(step.tokens, tokens)
        assert np.array_equal(step.nfe, nfe)
        assert np.array_equal(step.change.committed, committed)
        wrote = step.change.committed & (step.tokens != step.predicted)
        assert not wrote.any()
        for expected, value in zip(more, (step.predicted, step.recomputed), strict=False):
            assert np.array_equal(value, expected)


def test_a_second_run_captures_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device, lm = Device(), random_llada()
    monkeypatch.setattr(
        "dllm.decoding.memory.Forward", lambda backbone, wanted: graphs.Forward(backbone, True, device.capture)
    )
    options: dict[str, Any] = {"gen_length": 12, "block_length": 6, "stop_at_eos": False}
    results = [dllm.generate(lm, PROMPTS[:3], "vanilla", "dual", **options) for _ in range(3)]
    first = len(device.made)
    assert first > 0
    assert all(torch.equal(each.sequences, results[0].sequences) for each in results)
    assert len(device.made) == first
    lm.backbone.float().double()  # weights that are elsewhere now
    again = dllm.generate(lm, PROMPTS[:3], "vanilla", "dual", **options)
    assert len(device.made) > first
    assert again.sequences.shape == results[0].sequences.shape


def test_two_engines_at_a_time_do_not_share_memory() -> None:
    lm = random_llada()
    dllm.generate(lm, PROMPTS[:2], "threshold", "dual", gen_length=8)
    engines = [waiting_engine(lm, PROMPTS[:2], "threshold", "dual", gen_length=8) for _ in range(2)]
    answers: list[dict[int, dllm.Answer]] = [{}, {}]
    while any(engine.busy for engine in engines):
        for engine, found in zip(engines, answers, strict=True):
            found |= {event.id: event.answer for event in engine.step() if event.answer is not None}
    assert all(alike(answers[0][n], answers[1][n]) for n in range(2))


@dataclass(frozen=True)
class Polishing(Policy):
    """Commits two tokens a step; when none is missing it rewrites the first position twice more."""

    mask: int = 63

    def start(self, run: Any) -> Tensor:
        return torch.zeros(run.slots, dtype=torch.long, device=run.device)

    def enter(self, state: Tensor, row: int, request: Any) -> None:
        state[row] = 0

    def step(self, window: Window, denoise: Denoise, state: Tensor) -> Edit:
        prediction = denoise(decided=True)
        done = ~((window.tokens == self.mask) & window.region).any(-1)
        edit = commit(window, prediction, top(prediction.confidence, 2, window.masked))
        state[window.rows] += done
        start = window.start[:, None]
        tokens = torch.cat((edit.tokens, state[window.rows, None] + 1), 1)
        write = torch.cat((edit.write, done[:, None]), 1)
        return Edit(torch.cat((window.columns, start), 1), tokens, write, finished=state[window.rows] == 2)


@pytest.mark.parametrize("cache", ["none", "dual", "prefix", "freecache", "dkv"])
@pytest.mark.parametrize("make", [random_llada, random_dream])
def test_a_policy_may_go_on_after_the_last_mask(make: Callable[..., dllm.LanguageModel], cache: str) -> None:
    together = dllm.generate(make(), PROMPTS, Polishing(), cache, gen_length=8, block_length=4, batch_size=3)
    assert together.nfe.tolist() == [6] * len(PROMPTS)
    assert (together.completions[:, 0] == 3).all()
    for number, prompt in enumerate(PROMPTS[:3]):
        alone = dllm.generate(make(), [prompt], Polishing(), cache, gen_length=8, block_length=4)
        assert alone.completions[0].tolist() == together.completions[number].tolist()


def test_a_policy_that_goes_on_for_ever_is_stopped() -> None:
    with pytest.raises(RuntimeError, match="makes no progress in request 0"):
        dllm.generate(random_llada(), [[5]], Stalling(), gen_length=4)

    @dataclass(frozen=True)
    class Restless(Polishing):
        def step(self, window: Window, denoise: Denoise, state: Tensor) -> Edit:
            edit = super().step(window, denoise, state)
            return Edit(edit.columns, edit.tokens % 60, edit.write, finished=torch.zeros_like(edit.write[:, 0]))

    with pytest.raises(RuntimeError, match="makes no progress in request 0"):
        dllm.generate(random_llada(), [[5]], Restless(), gen_length=4)


def test_what_ends_a_text_ends_it_for_a_policy_that_would_go_on() -> None:
    lm = random_llada(tokenizer=True, seed=3)
    polishing, options = Polishing(lm.backbone.mask_token_id), {"gen_length": 18, "block_length": 6}
    free = dllm.generate(lm, [[4, 5]], polishing, stop_at_eos=False, **options)
    stop = str(free.texts[0])[4:8]
    stopped = dllm.generate(lm, [[4, 5]], polishing, stop_at_eos=False, stop=stop, **options)
    assert stopped.texts[0] is not None
    assert stop not in stopped.texts[0]
    assert stopped.nfe[0] < free.nfe[0]


def test_a_policy_that_finishes_a_row_with_masks_is_told() -> None:
    @dataclass(frozen=True)
    class Hasty(Polishing):
        def step(self, window: Window, denoise: Denoise, state: Tensor) -> Edit:
            edit = super().step(window, denoise, state)
            return Edit(edit.columns, edit.tokens, edit.write, finished=torch.ones_like(edit.write[:, 0]))

    with pytest.raises(RuntimeError, match="finished a row that has masks"):
        dllm.generate(random_llada(), [[5]], Hasty(), gen_length=8)


def test_a_closed_engine_takes_nothing_and_lends_its_memory_once() -> None:
    lm = random_llada()
    with dllm.Engine(lm, cache="dual", batch_size=1, max_length=12) as engine:
        engine.add([5], gen_length=4)
        assert len(finished(engine)) == 1
    with pytest.raises(ValueError, match="the engine is closed"):
        engine.add([5], gen_length=4)
    other = dllm.Engine(lm, cache="dual", batch_size=1, max_length=12)
    assert lm.spare == []
    engine.close()
    assert lm.spare == []
    assert other.add([5], gen_length=4) == 0


def test_a_request_that_comes_while_an_engine_is_closed_is_refused() -> None:
    class Closing(Leftmost):
        def check(self, state: Any, request: Any) -> None:
            engine.close()

    engine = dllm.Engine(random_llada(), Closing(), batch_size=1, max_length=12)
    with pytest.raises(ValueError, match="the engine is closed"):
        engine.add([5], gen_length=4)
    assert not engine.busy


class TestLengthFromMemory:
    """The longest request where none is given: the model's context, or what fits."""

    @pytest.mark.parametrize("cache", ["none", "dual", "dllm_cache", "d2cache"])
    def test_they_take_four_fifths_of_what_is_free(self, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = random_llada(max_length=256)
        layers, heads, size = lm.backbone.kv_shape
        column = 3 * layers * 8 * (2 * heads * size + (2 * 32 if cache == "dllm_cache" else 0))
        monkeypatch.setattr("dllm.decoding.memory.free_bytes", lambda device: 100 * column)
        lengths = [dllm.Engine(lm, "threshold", cache, batch_size=3).max_length for _ in range(2)]
        spare = 1 if cache == "dual" else 0
        assert lengths == [256 if cache == "none" else 80 - spare] * 2

    def test_they_count_as_free_for_the_next_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = random_llada(max_length=256)
        free = [10**6]
        monkeypatch.setattr("dllm.decoding.memory.free_bytes", lambda device: free[0])
        with dllm.Engine(lm, "threshold", "dual", batch_size=8) as engine:
            length = engine.max_length
            free[0] -= sum(each.nbytes for each in engine._memory._tensors.values())
        assert 10 < dllm.Engine(lm, "threshold", "dual", batch_size=8).max_length == length < 256

    def test_no_room_at_all_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dllm.decoding.memory.free_bytes", lambda device: 1000)
        with pytest.raises(ValueError, match=r"batch_size=8 leaves no room for keys and values: .* 800 are free"):
            dllm.Engine(random_llada(), "threshold", "dual")


class TestPrecision:
    @pytest.mark.parametrize("cache", ["none", "dual", "dllm_cache", "sparse"])
    def test_autocast_outside_changes_nothing(self, cache: str) -> None:
        lm = random_llada(dtype=torch.float32)
        expected = dllm.generate(lm, [[1, 2, 3]], "threshold", cache, gen_length=8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = dllm.generate(lm, [[1, 2, 3]], "threshold", cache, gen_length=8)
            likely = loglikelihood(lm, [1, 2], [3, 4], Estimate(samples=2))
        assert torch.equal(found.sequences, expected.sequences)
        assert likely == loglikelihood(lm, [1, 2], [3, 4], Estimate(samples=2))

    def test_a_model_that_is_cast_needs_a_new_engine(self) -> None:
        lm = random_llada(dtype=torch.float32)
        engine = dllm.Engine(lm, "threshold", "dual", batch_size=1, max_length=40)
        lm.backbone.to(torch.float64)
        with pytest.raises(ValueError, match="the model has another precision than when this engine was made"):
            engine.add([1, 2, 3], gen_length=8)

    def test_dropout_that_is_on_is_told(self) -> None:
        lm = random_llada(seed=5)
        lm.backbone.add_module("more", torch.nn.Dropout(0.5))
        with pytest.warns(Notice, match="dropout is on"):
            dllm.generate(lm, [[1, 2, 3]], gen_length=4)
        lm.backbone.eval()


@pytest.mark.parametrize("make", [random_diffusion_gemma, random_llada2])
def test_a_model_that_is_cast_is_the_one_that_is_loaded_in_that_precision(make: Any, tmp_path: Path) -> None:
    make(dtype=torch.float32).backbone.save_pretrained(tmp_path)
    loaded = dllm.load(tmp_path, device="cpu", dtype="bfloat16")
    cast = dllm.load(tmp_path, device="cpu", dtype="float32")
    cast.backbone.to(torch.bfloat16)
    before, after = (dict(lm.backbone.named_buffers()) for lm in (loaded, cast))
    assert before.keys() == after.keys() != set()
    for name, buffer in before.items():
        assert torch.equal(buffer.bfloat16(), after[name].bfloat16())
        assert torch.equal(buffer, after[name])
        assert buffer.dtype == after[name].dtype
    for lm in (loaded, cast):
        lm.backbone.float()
    wide = dict(dllm.load(tmp_path, device="cpu", dtype="float32").backbone.named_buffers())
    for lm in (loaded, cast):
        assert all(torch.equal(each, wide[name]) for name, each in lm.backbone.named_buffers() if "layer" not in name)
        lm.backbone.bfloat16()
    one, other = (
        dllm.generate(lm, [[*range(1, 20)]], "threshold", "block", gen_length=16, seed=0) for lm in (loaded, cast)
    )
    assert torch.equal(one.sequences, other.sequences)


@in_a_process
def test_a_stream_that_is_not_read_to_its_end_ends_with_the_interpreter() -> None:
    script = "import dllm; frames = dllm.stream(dllm.load('tiny-llada'), 'Tom', gen_length=8); next(frames)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
