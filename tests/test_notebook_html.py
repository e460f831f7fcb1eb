"""What a notebook shows of results, frames and traces."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm
from dllm.decoding import html
from dllm.decoding.colours import RAMPS
from dllm.decoding.html import MOST_ROWS, MOST_TOKENS, Vocabulary
from dllm.evaluation import trace_html
from dllm.evaluation.recording import Recording
from dllm.evaluation.trace import Trace
from models import random_dream, random_llada
from report_rig import frames, trace

LM = random_llada(tokenizer=True, layers=1)
MASK, EOS = LM.backbone.mask_token_id, LM.backbone.eos_token_ids[0]
PROMPTS = ["Tom has 23 apples.", "Mia has 48 pens. She"]
SHORT: dict[str, Any] = {"gen_length": 8, "block_length": 4, "stop_at_eos": False}
LIMIT = 400_000  # characters


class Page(HTMLParser):
    """The elements of a fragment, which must be closed in order, and its text."""

    VOID = ("br", "hr", "img")

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(fragment)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def styles(self) -> list[str]:
        return [str(attributes["style"]) for _, attributes in self.tags if "style" in attributes]


class Odd:
    """A tokenizer whose tokens are as awkward as can be."""

    WORDS = ("<script>alert(1)</script>", "&amp;", "a\nb", "\"quoted'", "", "\x1b[31m", "\u202eright to left", "é")

    def decode(self, tokens: list[int]) -> str:
        return self.WORDS[tokens[0] % len(self.WORDS)]


def shown_by(thing: Any) -> Page:
    return Page(thing._repr_html_())


@pytest.fixture(scope="module")
def result() -> dllm.Generation:
    return dllm.generate(LM, PROMPTS, "vanilla", **SHORT)


class TestGeneration:
    def test_has_the_prompt_and_every_token_with_the_forward_that_committed_it(self, result: dllm.Generation) -> None:
        page = shown_by(result)
        assert "2 prompts · 16 tokens · NFE 8.0 per prompt · TPF 1.00" in page.text
        assert "Tom has 23 apples." in page.text
        titles = [attributes["title"] for tag, attributes in page.tags if "title" in attributes]
        for row in range(2):
            steps = [f"forward {step + 1} of 8" for step in result.commit_step[row].tolist()]
            assert titles[8 * row :][:8] == steps
            words = [LM.tokenizer.decode([token]) for token in result.completions[row].tolist()]
            assert "".join("∎" if word == "<|endoftext|>" else word for word in words) in page.text

    def test_early_and_late_tokens_differ_in_colour_and_the_legend_says_how(self, result: dllm.Generation) -> None:
        page = shown_by(result)
        ends = RAMPS["commit_step"][0], RAMPS["commit_step"][-1]
        first, last = ("background:#" + bytes(colour).hex() for colour in ends)
        assert sum(style.startswith(first) for style in page.styles()) == 2
        assert sum(style.startswith(last) for style in page.styles()) == 2
        assert page.text.strip().endswith("last")

    def test_text_ends_where_the_answer_does(self) -> None:
        eos = int(dllm.generate(LM, PROMPTS, "vanilla", **SHORT).completions[0, 3])
        cut = dllm.generate(LM, PROMPTS[:1], "vanilla", gen_length=8, block_length=4, eos_token_id=eos)
        page = shown_by(cut)
        titles = [attributes for tag, attributes in page.tags if "title" in attributes]
        tokens = int(cut.attention_mask[0, -8:].sum())
        assert tokens < 8
        assert f"{tokens} token" in page.text
        assert len(titles) <= tokens

    def test_infilled_tokens_are_coloured_and_given_ones_are_not(self) -> None:
        mask = LM.tokenizer.mask_token
        page = shown_by(dllm.infill(LM, [f"Tom has{mask}{mask} apples.", f"He has{mask}."]))
        assert [tag for tag, attributes in page.tags if "title" in attributes] == ["span"] * 3
        assert "Tom has" in page.text
        assert " apples." in page.text
        assert "∎" not in page.text.split("#1")[1][:20]  # the padding of the shorter row

    def test_a_failed_row_says_why_and_keeps_its_masks(self, result: dllm.Generation) -> None:
        tokens, steps, real = (each.clone() for each in (result.completions, result.commit_step, result.attention_mask))
        tokens[1, 2:6], steps[1, 2:6], real[1, -8:] = MASK, -1, 0
        failed = replace(
            result, completions=tokens, commit_step=steps, attention_mask=real, errors=(None, "logits are <not> finite")
        )
        page = shown_by(failed)
        assert "no answer: logits are <not> finite" in page.text
        assert "····" in page.text.split("#1")[1]

    def test_without_a_tokenizer_the_ids_are_shown(self) -> None:
        out = dllm.generate(random_dream(), [[5, 6, 7]], "vanilla", **SHORT)
        page = shown_by(out)
        assert " 5 6 7" in page.text
        assert " 5 6 7" in shown_by(replace(out, vocabulary=None)).text

    def test_one_prompt_needs_no_number(self, result: dllm.Generation) -> None:
        assert shown_by(dllm.generate(LM, PROMPTS[:1], "vanilla", **SHORT)).text.count("NFE") == 1
        assert shown_by(result).text.count("NFE") == 3
        assert "#1 · NFE 8 · TPF 1.00 · 8 tokens" in shown_by(result).text

    def test_many_prompts_and_long_canvases_are_bounded_and_counted(self) -> None:
        rows, length = 300, 5000
        many = dllm.Generation(
            sequences=torch.full((rows, 2 * length), 7),
            completions=torch.arange(length).expand(rows, length),
            texts=[""] * rows,
            nfe=torch.full((rows,), length),
            guide_nfe=torch.zeros(rows, dtype=torch.long),
            commit_step=torch.arange(length).expand(rows, length),
            stats=dllm.generate(LM, PROMPTS[:1], "threshold", **SHORT).stats,
            attention_mask=torch.ones((rows, 2 * length), dtype=torch.long),
            lengths=torch.full((rows,), length),
            vocabulary=Vocabulary(None, -5, (-6,)),
        )
        shown = many._repr_html_()
        assert len(shown) < 2 * LIMIT
        assert f"and {rows - MOST_ROWS} more" in Page(shown).text
        assert f"and {length - MOST_TOKENS:,} more tokens" in Page(shown).text


class TestFrame:
    def test_new_tokens_stand_out_and_masks_are_dots(self) -> None:
        first, *_, last = dllm.stream(LM, PROMPTS, "vanilla", **SHORT)
        page = shown_by(first)
        assert page.text.count("NFE 1 · 1 new") == 2
        assert page.styles().count(html.NEW) == 2 + 1  # and the legend
        assert "Mia has 48 pens. She" in page.text
        assert "····" in page.text
        assert "·····" not in shown_by(last).text

    def test_one_request_of_an_engine_is_shown_alike(self) -> None:
        engine = dllm.Engine(LM, "vanilla", batch_size=2, max_length=64)
        engine.add(PROMPTS[0], **SHORT)
        engine.add(PROMPTS[1], **SHORT)
        events = engine.step()
        engine.close()
        assert "Tom has 23 apples." in shown_by(events[0].frame).text
        assert "#" not in shown_by(events[0].frame).text

    def test_a_token_that_is_masked_again_stands_out(self) -> None:
        frame = next(dllm.stream(LM, PROMPTS[:1], "vanilla", **SHORT))
        revoked = torch.zeros_like(frame.revoked)
        revoked[0, -1] = True
        page = shown_by(replace(frame, revoked=revoked))
        assert "1 masked again" in page.text
        assert page.styles().count(html.REVOKED) == 1

    def test_long_canvases_and_many_rows_are_bounded_and_counted(self) -> None:
        tokens = torch.arange(50_000).expand(40, 50_000)
        off = torch.zeros_like(tokens, dtype=torch.bool)
        alternating = tokens % 2 == 0
        shown = dllm.Frame(tokens, tokens, alternating, off, torch.ones(40, dtype=torch.long))._repr_html_()
        assert len(shown) < 2 * LIMIT
        assert "and 28 more" in Page(shown).text
        assert "49,488 tokens" in Page(shown).text


class TestTrace:
    def test_has_a_row_for_every_step_with_its_forwards_and_columns(self) -> None:
        shown = trace()
        page = shown_by(shown)
        rows = sum(tag == "tr" for tag, _ in page.tags)
        assert rows == sum(len(each.canvas) + 1 for each in shown.frames)
        assert "5 samples · 2 step by step" in page.text
        assert "problem 1 · " in page.text
        assert [attributes for tag, attributes in page.tags if tag == "details"] == [{"open": None}, {}]

    def test_long_traces_are_bounded_and_counted(self) -> None:
        one = frames(generated=2000)
        long = replace(trace(), frames=(one,) * 9)
        page = long._repr_html_()
        assert len(page) < 4 * LIMIT
        text = Page(page).text
        assert f"and {len(one.canvas) - trace_html.MOST_STEPS:,} more steps" in text
        assert "and 5 more" in text
        assert "more tokens" in text

    def test_what_generate_decodes_can_be_recorded(self, tmp_path: Path) -> None:
        recording = Recording(LM)
        result = dllm.generate(LM, PROMPTS, "tiny/wino", "dual", callback=recording, **SHORT)
        made = recording.trace()
        made.save(tmp_path / "trace.safetensors")
        again = Trace.load(tmp_path / "trace.safetensors")
        assert again.tokens.tolist() == result.completions.tolist()
        assert again.commit_step.tolist() == result.commit_step.tolist()
        for row, each in enumerate(again.frames):
            assert LM.tokenizer.decode(each.prompt) == PROMPTS[row]
            assert each.canvas[-1].tolist() == result.completions[row].tolist()
            assert each.nfe[-1] == result.nfe[row]
        assert "Mia has 48 pens. She" in shown_by(again).text

    def test_a_recording_begins_anew_in_another_call(self) -> None:
        def interrupt(step: dllm.Step) -> None:
            recording(step)
            if (step.nfe >= 3).any():
                raise KeyboardInterrupt

        recording, expected = Recording(LM), Recording(LM)
        with pytest.raises(KeyboardInterrupt):
            dllm.generate(LM, ["Ann has 2 pens.", *PROMPTS], callback=interrupt, **SHORT)
        for each in (expected, recording, recording):
            dllm.generate(LM, PROMPTS, "tiny/wino", "dual", callback=each, **SHORT)
        assert recording.trace().ids == expected.trace().ids
        for one, other in zip(recording.trace().frames, expected.trace().frames, strict=True):
            assert one.canvas.tolist() == other.canvas.tolist()

    def test_a_recording_of_nothing_says_what_to_do(self) -> None:
        with pytest.raises(ValueError, match="callback="):
            Recording(LM).trace()


def everything(vocabulary: Vocabulary, words: dict[int, str]) -> list[str]:
    tokens, steps = torch.arange(8).expand(2, 8), torch.arange(8).expand(2, 8)
    result = dllm.generate(LM, PROMPTS, "vanilla", **SHORT)
    shown = replace(result, completions=tokens, commit_step=steps, vocabulary=vocabulary)
    frame = next(dllm.stream(LM, PROMPTS, "vanilla", **SHORT))
    canvas = torch.arange(frame.tokens.shape[1]).expand_as(frame.tokens)
    return [
        each._repr_html_()
        for each in (
            shown,
            replace(frame, tokens=canvas, provisional=canvas, vocabulary=vocabulary),
            replace(trace(), words=words, ids=("<b>",) * 5, frames=(frames("<b>&"),)),
        )
    ]


def test_tokens_are_escaped_and_no_script_is_needed() -> None:
    odd: Any = Odd()
    for shown in everything(Vocabulary(odd, MASK, (EOS,)), {token: odd.decode([token]) for token in range(64)}):
        page = Page(shown)
        assert {tag for tag, _ in page.tags} <= {"div", "span", "details", "summary", "table", "tr", "th", "td"}
        assert "<script>alert(1)</script>" in page.text
        assert "&amp;" in page.text
        assert "⏎" in page.text
        assert "▯" in page.text
        assert not set("\x1b\u202e") & set(shown)
        assert not re.search(r"https?:|url\(|<style|onload", shown)


def test_colours_are_legible_on_light_and_dark_grounds() -> None:
    for shown in everything(Vocabulary(LM.tokenizer, MASK, (EOS,)), {}):
        for style in Page(shown).styles():
            own = dict(part.split(":", 1) for part in style.split(";"))
            # A ground of its own, or else the text colour of the notebook.
            assert ("color" in own) == (own.get("background", "").startswith("#"))
