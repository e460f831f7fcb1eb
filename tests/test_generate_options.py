"""`dllm generate` filling masks, stopping at strings, and going on with answers that are begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import dllm
from commands import Outcome, command
from models import random_llada, save_folder

LM = random_llada(tokenizer=True, seed=1, max_length=96)
TEXT = "Tom has <|mdm_mask|><|mdm_mask|> apples. He buys 12.<|mdm_mask|>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run the command with a tiny random model."""
    folder = save_folder(LM, tmp_path_factory.mktemp("model") / "m")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} So {% endif %}{% endfor %}"
        "{% if add_generation_prompt %} So{% endif %}"
    )
    return lambda *arguments: command("generate", f"model={folder}", "block_length=5", *arguments)


def rows(path: Path) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: str(row["id"]))


def refused(result: Outcome, named: str) -> None:
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("dllm generate: error: ")
    assert named in result.err


def lines(path: Path, *every: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in every))
    return path


class TestInfill:
    def test_masks_of_a_prompt_are_filled_and_drawn_within_their_text(self, run: Any, tmp_path: Path) -> None:
        picture = tmp_path / "canvas.svg"
        told = run("infill=true", f"prompt={TEXT}", f"picture={picture}")
        expected = dllm.infill(LM, TEXT, block_length=5)
        shown = told.out.splitlines()
        assert (told.code, told.err, shown[0]) == (0, "", TEXT)
        assert shown[-2] == expected.texts[0]
        assert shown[-1].startswith(f"NFE {expected.nfe[0]}  tokens 3 ")
        drawn = [line[6:] for line in shown[1:-2]]
        assert [line.count("·") for line in drawn] == [2, 1, 0]
        assert all(line.startswith("Tom has") and " apples. He buys 12." in line for line in drawn)
        assert " apples. He buys 12." in "".join(ElementTree.parse(picture).getroot().itertext()).replace("\xa0", " ")

    def test_given_end_of_text_hides_nothing(self, run: Any) -> None:
        shown = run("infill=true", "prompt=Tom<|endoftext|> has <|mdm_mask|> apples.").out.splitlines()
        assert shown[1].endswith(" apples.")
        assert shown[-2].endswith(" apples.")

    def test_lines_of_a_file_are_filled(self, run: Any, tmp_path: Path) -> None:
        texts = [TEXT, "Ann has <|mdm_mask|> pens.", "<|mdm_mask|>"]
        source = lines(tmp_path / "q.jsonl", *({"prompt": text} for text in texts))
        output = tmp_path / "a.jsonl"
        told = run("infill=true", f"input={source}", f"output={output}", "batch_size=2", "sampler=threshold")
        expected = dllm.infill(LM, texts, "threshold", block_length=5)
        assert told.code == 0
        found = rows(output)
        assert [row["text"] for row in found] == expected.texts
        assert [row["nfe"] for row in found] == expected.nfe.tolist()
        assert [row["tokens"] for row in found] == [3, 1, 1]

    @pytest.mark.parametrize("option", ["gen_length=8", "stop_at_eos=false", "stop=x", "++gen_length=8"])
    def test_options_without_effect_are_refused(self, run: Any, option: str) -> None:
        refused(run("infill=true", f"prompt={TEXT}", option), f" {option.strip('+').partition('=')[0]}=")

    def test_texts_without_masks_and_masks_without_infilling_are_refused(self, run: Any, tmp_path: Path) -> None:
        refused(run("infill=true"), "infill=true needs a text with masks; give prompt or input")
        refused(run("infill=true", "prompt=Tom"), "prompt has no [MASK]; put one (<|mdm_mask|>)")
        refused(run(f"prompt={TEXT}"), "prompt contains [MASK]; use infill (infill=true)")
        source = lines(tmp_path / "q.jsonl", {"prompt": TEXT}, {"id": "b", "prompt": "Tom"})
        refused(run("infill=true", f"input={source}", f"output={tmp_path}/a.jsonl"), "line 2 (id 'b') has no [MASK]")
        refused(run("infill=maybe"), "infill='maybe'")


@pytest.fixture(scope="module")
def free() -> str:
    return str(dllm.generate(LM, "Tom", gen_length=12, block_length=5, seed=0, stop_at_eos=False).texts[0])


class TestStop:
    @pytest.mark.parametrize("write", [str, json.dumps, lambda stop: json.dumps(["never", stop])])
    def test_answers_end_before_it(self, run: Any, free: str, write: Any, tmp_path: Path) -> None:
        stop = free[len(free) // 2 :][:4]
        options = ["gen_length=12", "stop_at_eos=false", f"stop={write(stop)}"]
        shown = run("prompt=Tom", "show=none", *options).out.splitlines()
        assert shown[1] == free[: free.index(stop)]
        source, output = lines(tmp_path / "q.jsonl", {"prompt": "Tom"}), tmp_path / "a.jsonl"
        assert run(f"input={source}", f"output={output}", *options).code == 0
        assert rows(output)[0]["text"] == free[: free.index(stop)]
        assert rows(output)[0]["nfe"] < 12

    def test_an_empty_answer_is_told(self, run: Any, free: str, tmp_path: Path) -> None:
        options = ["gen_length=12", "stop_at_eos=false", f"stop={json.dumps(free[:3])}"]
        source, output = lines(tmp_path / "q.jsonl", {"prompt": "Tom"}), tmp_path / "a.jsonl"
        for where, told in (("prompt=Tom", "the answer is empty: "), (f"input={source}", "1 of 1 answers are empty: ")):
            extra = [f"output={output}"] if where.startswith("input") else []
            result = run(where, "show=none", *extra, *options)
            assert (result.code, result.err) == (0, "")
            assert sum(line.startswith(told) for line in result.out.splitlines()) == 1
            assert "eos_suppression=confidence puts end-of-text off" in result.out
            output.unlink(missing_ok=True)
            result = run(where, "show=none", *extra, *options, "eos_suppression=confidence")
            assert "eos_suppression=confidence" not in result.out.replace(
                "eos_suppression=logits never predicts it", ""
            )

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("###", "###"), ('["\\n\\n","Q:"]', ["\n\n", "Q:"]), ("a, b", "a, b"), ("${x}", "${x}"), ("[", "["),
            ('["it\'s","???","x=y"]', ["it's", "???", "x=y"]), ("null", None), ("5", "5"), ("true", "true"),
            ('"\\n"', "\n"), ("[a,b]", ["a", "b"]), ('"', '"'), ("\n\n", "\n\n"), ("[]", []),
        ],
    )  # fmt: skip
    def test_any_text_survives_the_command_line(
        self, run: Any, written: str, meant: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        received = []
        monkeypatch.setattr(dllm, "load", lambda path, **options: LM)
        monkeypatch.setattr(dllm, "generate", lambda *given, **options: received.append(options["stop"]) or given[0])
        with pytest.raises(AttributeError):
            run("prompt=Tom", f"stop={written}")
        assert received == [meant]

    @pytest.mark.parametrize(
        ("written", "named"),
        [("", "stop=''"), ('["a",""]', "stop=['a', '']"), ("[1]", "stop=[1]"), ("\udcff", "UTF-8")],
    )
    def test_what_stops_nothing_is_refused(self, run: Any, written: str, named: str) -> None:
        refused(run("prompt=Tom", f"stop={written}"), named)


class TestChats:
    def test_an_answer_that_is_begun_goes_on(self, run: Any, tmp_path: Path) -> None:
        parts = [{"type": "text", "text": "Tom has"}, {"type": "text", "text": " 5"}]
        source = lines(
            tmp_path / "q.jsonl",
            {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Tom"}]},
            {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]},
        )
        output = tmp_path / "a.jsonl"
        assert run(f"input={source}", f"output={output}", "gen_length=6").code == 0
        expected = dllm.generate(LM, ["Tom has 5 So Tom", "Tom has 5 So"], gen_length=6, block_length=5)
        assert [row["text"] for row in rows(output)] == expected.texts

    def test_what_is_no_text_is_refused_by_its_line(self, run: Any, tmp_path: Path) -> None:
        picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
        source = lines(tmp_path / "q.jsonl", {"prompt": "Tom"}, {"id": "p", "messages": [picture]})
        told = run(f"input={source}", f"output={tmp_path}/a.jsonl", "gen_length=6")
        refused(told, "line 2 (id 'p') has content of type 'image_url'; give text")
