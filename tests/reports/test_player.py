"""The drawing of a trace on a terminal: tokens, colours, drafts and columns."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from rich.segment import Segment
from rich.style import Style

from dllm.decoding.colours import RAMPS, UNKNOWN, shade
from dllm.evaluation.trace import Frames, Trace
from dllm.reports.player import OPEN, draw, line, moment, word
from report_rig import EOS, MASK, trace

HE, HAS, STOP = 2, 3, 4
NAN = np.nan


def small(**changes: object) -> Trace:
    """Two prompt tokens and four positions in three steps: a draft accepted, one rejected, one token taken back."""
    fields: dict[str, object] = {
        "id": "one",
        "prompt": np.array([HE, STOP]),
        "canvas": np.array([[MASK, HAS, MASK, MASK], [HE, MASK, STOP, MASK], [HE, HAS, STOP, EOS]]),
        "predicted": np.array([[HE, HAS, MASK, MASK], [HE, STOP, STOP, EOS], [MASK, HAS, MASK, HE]]),
        "confidence": np.array([[0.5, 0.75, NAN, NAN], [0.25, 0.5, 1, 0.5], [NAN, 0.5, NAN, 0.5]], np.float32),
        "drafted": np.array([[MASK] * 4, [MASK, HAS, STOP, MASK], [MASK, MASK, 77, MASK]]),
        "computed": np.array([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1]], bool),
        "nfe": np.array([1, 2, 4]),
    }
    return Trace(
        ids=("one",),
        tokens=np.array([[HE, HAS, STOP, EOS]]),
        commit_step=np.array([[1, 2, 1, 2]]),
        confidence=np.ones((1, 4), np.float32),
        frames=(Frames(**fields | changes),),  # type: ignore[arg-type]
        words={HE: "He", HAS: " has", STOP: ".", EOS: "<end>", MASK: "<mask>"},
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
    )


def segments(shown: Trace, step: int, colour: str = "commit_step", width: int = 120) -> list[list[Segment]]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    return console.render_lines(draw(shown, 0, step, colour), pad=False)  # type: ignore[arg-type]


def canvas(shown: Trace, step: int, colour: str = "commit_step") -> dict[str, Style]:
    """The texts of the canvas in order, and their styles."""
    return {part.text: part.style or Style() for part in segments(shown, step, colour)[3] if part.text.strip()}


def text(shown: Trace, step: int, width: int = 120) -> list[str]:
    return ["".join(part.text for part in row).rstrip() for row in segments(shown, step, width=width)]


class TestMoment:
    def test_a_token_has_the_step_and_confidence_it_was_written_with(self) -> None:
        frames = small().frames[0]
        assert moment(frames, 0, MASK).commit_step.tolist() == [-1, 0, -1, -1]
        assert moment(frames, 1, MASK).commit_step.tolist() == [1, -1, 1, -1]
        last = moment(frames, 2, MASK)
        assert last.commit_step.tolist() == [1, 2, 1, 2]
        # The last position was predicted otherwise than it was written.
        np.testing.assert_array_equal(last.confidence, np.array([0.25, 0.5, 1, NAN], np.float32))

    def test_what_is_open_has_the_confidence_of_its_prediction(self) -> None:
        np.testing.assert_array_equal(moment(small().frames[0], 0, MASK).confidence, [0.5, 0.75, NAN, NAN])

    def test_drafts_are_accepted_where_the_canvas_holds_them(self) -> None:
        now = moment(small().frames[0], 1, MASK)
        assert (now.accepted.tolist(), now.rejected.tolist()) == (
            [False, False, True, False],
            [False, True, False, False],
        )

    def test_agrees_with_the_canvas_at_every_step(self) -> None:
        frames = trace().frames[0]
        for step, tokens in enumerate(frames.canvas):
            now = moment(frames, step, MASK)
            np.testing.assert_array_equal(now.open, tokens == MASK)
            np.testing.assert_array_equal(now.commit_step == -1, tokens == MASK)
            for place in np.flatnonzero(~now.open):
                since = now.commit_step[place]
                assert (frames.canvas[since : step + 1, place] == tokens[place]).all()
                assert since == 0 or frames.canvas[since - 1, place] != tokens[place]


class TestDrawing:
    def test_says_where_it_is_and_what_it_cost(self) -> None:
        head = text(small(), 1)[0]
        assert head == "sample one (1 of 1)  step 2 of 3  NFE 2  computed 4 of 6  drafts 1 of 2 accepted"
        assert "drafts" not in text(small(), 0)[0]

    def test_shows_prompt_tokens_guesses_and_masks(self) -> None:
        assert text(small(), 0)[2:4] == ["He.", "He has··"]
        styles = canvas(small(), 0)
        assert styles["He"].italic and styles["He"].dim
        assert styles["·"] == Style.parse(OPEN)
        assert text(small(), 2)[3] == "He has. 77∎"

    def test_colours_tell_when_a_token_was_written(self) -> None:
        styles = canvas(small(), 1)
        middle = shade("commit_step", 0.5)
        assert styles["He"].bgcolor is not None
        assert styles["He"].bgcolor.triplet == middle
        last = canvas(small(), 2)["∎"]
        assert last.bgcolor is not None and last.bgcolor.triplet == RAMPS["commit_step"][-1]

    def test_or_how_sure_it_was(self) -> None:
        styles = canvas(small(), 2, "confidence")
        assert {name: style.bgcolor.triplet for name, style in styles.items() if style.bgcolor} == {
            "He": shade("confidence", 0.25),
            " has": shade("confidence", 0.5),
            ".": shade("confidence", 1),
            "∎": UNKNOWN,
        }

    def test_drafts_are_marked(self) -> None:
        styles = canvas(small(), 1)
        assert styles["."].underline
        assert styles[" has"].strike
        # A draft that lost to another token stands behind it.
        last = canvas(small(), 2)
        assert list(last) == ["He", " has", ".", " 77", "∎"]
        assert last[" 77"].strike and not last["."].strike
        assert text(small(), 2)[3] == "He has. 77∎"

    def test_the_strip_has_a_sign_a_column(self) -> None:
        assert [text(small(), step)[5] for step in range(3)] == ["██████", "░░████", "░░░█░█"]
        assert text(small(), 2, width=4).count("░░░█") == 1

    def test_words_obey_no_terminal(self) -> None:
        shown = small()
        shown.words.update({HE: "\x1b[31m", HAS: "", STOP: "\n"})
        assert [word(shown, token) for token in (HE, HAS, STOP, EOS, 77)] == ["�[31m", "▯", "⏎", "∎", " 77"]
        assert "\x1b[31m" not in "".join(text(shown, 2))

    @pytest.mark.parametrize("colour", RAMPS)
    def test_shades_run_from_one_end_to_the_other(self, colour: str) -> None:
        ramp = RAMPS[colour]
        assert (shade(colour, 0), shade(colour, 1), shade(colour, NAN)) == (ramp[0], ramp[-1], UNKNOWN)
        assert shade(colour, 0.25) == ramp[1]
        assert (shade(colour, -1), shade(colour, 2)) == (ramp[0], ramp[-1])


def test_a_line_is_the_canvas_in_plain_text() -> None:
    assert [line(small(), 0, step) for step in range(3)] == [
        "   1  NFE    1  · has··",
        "   2  NFE    2  He·.·",
        "   3  NFE    4  He has.∎",
    ]
