"""Continuous batching: a row that is finished makes room for the next at once, and nothing else changes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dllm
from commands import command
from dllm.decoding.canvas import Canvas
from dllm.decoding.prediction import Sampling
from dllm.decoding.request import Request
from dllm.decoding.window import Edit
from dllm.resolve import names
from dllm.tasks import word_problems
from engine_rig import applied
from models import random_dream, random_frequencies, random_guide, random_llada
from policies import over_masks

MASK, EOS = 9, 7


def ragged(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 60) for _ in range(draw.randrange(1, 14))] for _ in range(count)]


def sampler(name: str) -> Any:
    match name:
        case "learn2pd":
            return dllm.samplers.Learn2PD(filter="tiny-llada", allow_mismatch=True, threshold=0.4)
        case "ar_guided":
            return dllm.samplers.ARGuided(random_guide(), accept="topk")
        case "pc":
            return dllm.samplers.PC(random_frequencies())
        case _:
            return name


class TestCanvas:
    """Rows of one prompt token and some masks, of which the first ones of every busy row are filled at each step."""

    @staticmethod
    def decode(lengths: list[int], slots: int, per_row: int = 1) -> Iterator[tuple[Canvas, Any, Any]]:
        canvas, leaving = Canvas(slots, 1 + max(lengths), MASK, torch.device("cpu")), set()
        waiting = [np.array([1, *[MASK] * length]) for length in lengths]
        while True:
            room = slots - len(canvas.rows) + len(leaving)
            entering, waiting = waiting[:room], waiting[room:]
            exchange = canvas.exchange(leaving, [Request(row, MASK, (EOS,), 2, Sampling(), 0) for row in entering])
            if not canvas.rows.size:
                return
            window = canvas.window()
            assert window.tokens.tolist() == canvas.host[canvas.rows].tolist()
            assert window.region.tolist() == canvas.region[canvas.rows].tolist()
            write = window.masked & (window.masked.cumsum(1) <= per_row)
            change = applied(canvas, Edit(window.columns, torch.full_like(window.columns, 3), write))
            leaving = set(change.finished.tolist())
            yield canvas, exchange, change

    def test_a_finished_row_is_replaced_by_the_next_in_its_slot(self) -> None:
        seen = [
            (exchange.slots.tolist(), exchange.moved.tolist(), canvas.rows.tolist(), change.finished.tolist())
            for canvas, exchange, change in self.decode([3, 1, 2, 2, 1], slots=2)
        ]
        assert seen == [
            ([0, 1], [], [0, 1], [1]),
            ([1], [], [0, 1], []),
            ([], [], [0, 1], [0, 1]),
            ([0, 1], [], [0, 1], [1]),
            ([], [], [0], [0]),
        ]

    def test_where_nobody_waits_the_last_rows_close_the_gaps(self) -> None:
        steps = self.decode([1, 4, 1, 4, 4], slots=5)
        next(steps)
        canvas, exchange, _ = next(steps)
        assert canvas.rows.tolist() == [3, 1, 4]
        assert exchange.moved.tolist() == [[3, 0], [4, 2]]

    def test_nothing_grows_with_the_rows(self) -> None:
        sizes = set()
        for canvas, _, _ in self.decode([4] * 50, slots=3, per_row=2):
            arrays = (each for name, each in vars(canvas).items() if name != "index")  # of the masks of one step
            held = [each for each in arrays if isinstance(each, (torch.Tensor, np.ndarray))]
            assert max(len(each) for each in held) == 3
            sizes.add(sum(each.nbytes for each in held if each is not canvas.rows))
        assert len(sizes) == 1


@pytest.mark.parametrize("cache", names("cache"))
@pytest.mark.parametrize("make", [random_llada, random_dream])
def test_results_are_those_of_rows_alone(make: Any, cache: str) -> None:
    lm, options = make(), {"gen_length": 10, "block_length": 4, "temperature": 0.3}
    prompts = ragged(13)
    together = dllm.generate(lm, prompts, "threshold", cache, seed=5, batch_size=4, **options)
    for number in range(0, 13, 3):
        alone = dllm.generate(lm, [prompts[number]], "threshold", cache, seed=5 + number, **options)
        assert together.completions[number].tolist() == alone.completions[0].tolist()
        assert together.nfe[number] == alone.nfe[0]


@pytest.mark.parametrize("name", over_masks())
def test_every_policy_goes_on_with_rows_that_come_later(name: str) -> None:
    lm, options = random_llada(), {"gen_length": 10, "block_length": 4, "seed": 3}
    prompts = ragged(11)
    together = dllm.generate(lm, prompts, sampler(name), "none", batch_size=3, **options)
    for number in (0, 4, 7, 10):
        alone = dllm.generate(lm, [prompts[number]], sampler(name), "none", **(options | {"seed": 3 + number}))
        assert together.completions[number].tolist() == alone.completions[0].tolist()
        assert (together.nfe[number], together.guide_nfe[number]) == (alone.nfe[0], alone.guide_nfe[0])


@pytest.mark.parametrize("draft_mode", ["batch", "tree"])
@pytest.mark.parametrize("cache", ["none", "dual", "freecache"])
def test_drafts_of_rows_that_come_later(cache: str, draft_mode: Any) -> None:
    lm, options = random_llada(), {"gen_length": 14, "block_length": 6}
    prompts = ragged(9)
    drafting = dllm.samplers.FreeDave(3, draft_mode=draft_mode)
    together = dllm.generate(lm, prompts, drafting, cache, batch_size=3, **options)
    plain = dllm.generate(lm, prompts, "vanilla", cache, **options)
    assert torch.equal(together.completions, plain.completions)


def test_columns_computed_do_not_depend_on_batch_mates() -> None:
    lm, prompts = random_llada(), ragged(9)
    for cache in names("cache"):
        computed = [
            dllm.generate(lm, prompts, "threshold", cache, gen_length=8, block_length=4, batch_size=size)
            for size in (1, 4)
        ]
        assert len({each.stats.computed_columns for each in computed}) == 1
        assert len({each.stats.computed_share for each in computed}) == 1


def test_two_hundred_ragged_prompts_keep_the_slots_busy(tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    lines = [{"id": n, "prompt": each.question} for n, each in enumerate(word_problems.problems(200, seed=4))]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["sampler=tiny/threshold", "cache=freecache", "gen_length=32", "batch_size=8", "show=none"]
    result = command("generate", f"input={questions}", f"output={answers}", *options)
    assert (result.code, result.err) == (0, "")
    told = next(line for line in result.out.splitlines() if "row slots busy" in line)
    assert float(told.split()[-1].rstrip("%")) >= 90
    lm = dllm.load("tiny-llada")
    few = [json.loads(line) for line in answers.read_text().splitlines() if json.loads(line)["id"] % 40 == 0]
    assert len(few) == 5
    freecache, threshold = dllm.cache.FreeCache(), dllm.resolve.resolve("sampler", "tiny/threshold", object)
    for answer in few:
        alone = dllm.generate(lm, lines[answer["id"]]["prompt"], threshold, freecache, gen_length=32)
        assert alone.texts == [answer["text"]]
        assert alone.nfe.tolist() == [answer["nfe"]]


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (8, 8), (20, 4)])
def test_the_share_of_busy_slots_is_told(rows: int, size: int) -> None:
    result = dllm.generate(random_llada(), [[5, 6]] * rows, "vanilla", gen_length=8, batch_size=size, stop_at_eos=False)
    assert result.stats.slots_busy == 1
    lm, busy = random_llada(), []
    ended = dllm.generate(
        lm, ragged(20), "threshold", gen_length=24, batch_size=6,
        callback=lambda step: busy.append(len(step) / 6),
    )  # fmt: skip
    assert ended.stats.slots_busy == pytest.approx(np.mean(busy))
