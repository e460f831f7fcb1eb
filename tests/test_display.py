"""What people see of a canvas: live, as lines, and as a picture."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from rich.text import Text

import dllm
from dllm.decoding.display import FRESH, MASKED, PROVISIONAL, SETTLED, CanvasView, live, plain, save_picture
from dllm.decoding.setup import Setup
from dllm.decoding.step import Step
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Policy
from models import random_llada

LM = random_llada(tokenizer=True, layers=1)
EOS, MASK = LM.backbone.eos_token_ids[0], LM.backbone.mask_token_id


class Script(Policy):
    """Writes given tokens at given places, one dictionary a step."""

    def __init__(self, *steps: dict[int, str]) -> None:
        self.steps = [{place: self.token(word) for place, word in step.items()} for step in steps]

    @staticmethod
    def token(word: str) -> int:
        return int(LM.tokenizer.convert_tokens_to_ids(word))

    def start(self, setup: Setup) -> list[dict[int, int]]:
        return list(self.steps)

    def step(self, window: Window, denoise: Denoise, state: list[dict[int, int]]) -> Edit:
        denoise()
        tokens, write = torch.zeros_like(window.columns), torch.zeros_like(window.masked)
        for place, token in state.pop(0).items():
            tokens[:, place], write[:, place] = token, True
        return Edit(window.columns, tokens, write)


def follow(script: Script, see: Callable[[Step], object], length: int) -> None:
    """Decode a script in one block."""
    dllm.generate(LM, "Tom", script, gen_length=length, block_length=None, callback=see)


def spans(text: Text) -> list[tuple[str, str]]:
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


STEPS = Script({1: " has"}, {0: "He", 3: "<|endoftext|>"}, {2: "."})


class TestCanvasView:
    def test_masks_are_dots_and_what_ends_a_text_is_left_out(self) -> None:
        lines: list[str] = []
        view = CanvasView(LM.tokenizer, 4)
        follow(STEPS, lambda step: lines.append(view.line(step)), 4)
        assert lines == ["· has", "He has", "He has."]

    def test_an_empty_canvas_is_still_a_line(self) -> None:
        lines: list[str] = []
        view = CanvasView(LM.tokenizer, 4)
        follow(Script({3: "<|endoftext|>"}, {0: "He", 1: ".", 2: "."}), lambda step: lines.append(view.line(step)), 4)
        assert lines[0] == "·"

    def test_fresh_tokens_stand_out_from_settled_ones(self) -> None:
        drawn: list[list[tuple[str, str]]] = []
        view = CanvasView(LM.tokenizer, 4)
        follow(STEPS, lambda step: drawn.append(spans(view.draw(step))), 4)
        assert (" has", FRESH) in drawn[0]
        assert drawn[1][:2] == [("He", FRESH), (" has", SETTLED)]
        assert ("∎", FRESH) in drawn[1]
        assert drawn[2] == [("He", SETTLED), (" has", SETTLED), (".", FRESH)]

    def test_guesses_are_dim_and_dots_stand_where_there_is_none(self) -> None:
        view = CanvasView(LM.tokenizer, 4)

        def see(step: Step) -> None:
            guesses = step.provisional[0, -4:]
            expected = []
            for column, guess in enumerate(guesses.tolist()):
                if step.tokens[0, column - 4] == MASK:
                    known = guess not in (MASK, EOS)
                    expected.append((LM.tokenizer.decode([guess]), PROVISIONAL) if known else ("·", MASKED))
            assert [span for span in spans(view.draw(step)) if span[1] in (PROVISIONAL, MASKED)] == expected
            seen.extend(expected)

        seen: list[tuple[str, str]] = []
        follow(STEPS, see, 4)
        assert PROVISIONAL in {style for _, style in seen}

    def test_one_row_of_several_can_be_drawn(self) -> None:
        lines: list[str] = []
        view = CanvasView(LM.tokenizer, 2)
        prompts = ["Tom", "Tom has 5 pens. He buys 7."]
        out = dllm.generate(LM, prompts, gen_length=2, callback=lambda step: lines.append(view.line(step, row=1)))
        assert lines[-1] == LM.tokenizer.decode(out.completions[1], skip_special_tokens=True)

    def test_without_a_tokenizer_ids_are_shown(self) -> None:
        lines: list[str] = []
        view = CanvasView(None, 4)
        follow(STEPS, lambda step: lines.append(view.line(step)), 4)
        he, has, stop = map(Script.token, ("He", " has", "."))
        assert lines == [f"· {has}", f" {he} {has}", f" {he} {has} {stop}"]


def test_plain_lines_are_numbered_by_step_and_say_only_what_is_new() -> None:
    lines: list[str] = []
    script = Script({0: "He"}, {3: "<|endoftext|>"}, {4: "<|endoftext|>"}, {1: " has"}, {2: "."})
    follow(script, plain(CanvasView(LM.tokenizer, 5), lines.append), 5)
    assert lines == ["   1  He", "   4  He has", "   5  He has."]


def test_a_live_display_shows_every_step_and_leaves_the_last() -> None:
    drawn, expected = io.StringIO(), []
    view = CanvasView(LM.tokenizer, 4)
    display, draw = live(view, Console(file=drawn, force_terminal=True, width=80, color_system=None))

    def see(step: Step) -> None:
        draw(step)
        expected.append(view.draw(step).plain)

    with display:
        follow(STEPS, see, 4)
    # What remains of a terminal's text when its control sequences are taken out.
    shown = [line for line in re.split(r"\x1b\[[0-9?;]*[A-Za-z]|[\r\n]", drawn.getvalue()) if line.strip()]
    assert list(dict.fromkeys(shown)) == expected


class TestPicture:
    @pytest.mark.parametrize("count", [1, 2, 12, 40])
    def test_first_and_last_frame_are_in_it_and_never_too_many(self, tmp_path: Path, count: int) -> None:
        path = tmp_path / "new" / "canvas.svg"
        save_picture([Text(f"frame{i}x") for i in range(count)], "title", path, most=12)
        shown = [line for line in _texts(path) if "step" in line]
        assert len(shown) == min(count, 12)
        assert "frame0x" in shown[0]
        assert f"frame{count - 1}x" in shown[-1]
        numbers = [int(line.split()[1]) for line in shown]
        assert numbers == sorted(set(numbers))
        assert (numbers[0], numbers[-1]) == (1, count)

    def test_any_title_and_text_is_well_formed(self, tmp_path: Path) -> None:
        path = tmp_path / "canvas.svg"
        save_picture([Text("1 < 2 & 'x' \"y\"")], '<b>&amp; "quoted" [bold]', path)
        texts = " ".join(_texts(path))
        assert "1 < 2 & 'x' \"y\"" in texts
        assert '<b>&amp; "quoted" [bold]' in texts


def _texts(path: Path) -> list[str]:
    """The lines of text in an SVG, pieces of one line joined."""
    lines: dict[str, str] = {}
    for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text"):
        lines[element.get("y", "")] = lines.get(element.get("y", ""), "") + "".join(element.itertext())
    return [line.replace("\xa0", " ") for line in lines.values()]
