"""`dllm generate`: what it prints, what it writes, what survives an interruption, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import dllm
from commands import Outcome, Terminal, command, in_a_process, start
from dllm.scripts import generate as application
from dllm.tasks import word_problems
from models import random_llada, save_folder

REPOSITORY = Path(__file__).parent.parent
QUESTION = "Tom has 23 apples. He buys 12. How many apples does he have?"
CHAT = [{"role": "user", "content": "Sam has 5 pens. He loses 2. How many pens does he have?"}]
LM = random_llada(tokenizer=True, seed=1, max_length=96)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model, in float64, whose tokenizer wraps chats."""
    folder = save_folder(LM, tmp_path_factory.mktemp("models") / "random model=1")
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }} So")
    return folder


@pytest.fixture
def run(model: Path):  # type: ignore[no-untyped-def]
    """Run the command with the tiny model."""
    return lambda *arguments: command("generate", f"model={model}", "gen_length=12", "block_length=5", *arguments)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Nine questions of unequal length, plain and as chats, with and without ids."""
    asked = [problem.question for problem in word_problems.problems(9, seed=1)]
    rows: list[dict[str, Any]] = [{"prompt": text} for text in asked]
    rows[1]["id"] = "one"
    rows[2] = {"id": 77, "messages": [{"role": "user", "content": asked[2]}]}
    rows[3] = {"messages": [{"role": "user", "content": asked[3]}]}
    rows[4]["prompt"] = "Tom"
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def by_id(path: Path) -> dict[str | int, dict[str, Any]]:
    found = rows(path)
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


class TestPrompt:
    def test_prints_prompt_canvas_answer_and_costs_as_plain_lines(self, run: Any) -> None:
        result = run(f"prompt={QUESTION}", "sampler=vanilla")
        expected = dllm.generate(LM, QUESTION, "vanilla", gen_length=12, block_length=5, seed=0)
        lines = result.out.splitlines()
        assert (result.code, result.err) == (0, "")
        assert lines[0] == QUESTION
        assert lines[-2] == expected.texts[0]
        assert all(re.fullmatch(r" *\d+  .*", line) for line in lines[1:-2])
        assert len(lines) > 6
        assert lines[-3].endswith(f"  {expected.texts[0]}")
        numbers = re.fullmatch(r"NFE (\d+)  tokens (\d+)  TPF (\d+\.\d\d)  \d+\.\d tokens/s", lines[-1])
        assert numbers is not None
        assert int(numbers[1]) == expected.nfe[0]
        assert int(numbers[2]) == expected.stats.tokens
        assert numbers[3] == f"{expected.stats.tpf:.2f}"

    def test_costs_that_nfe_does_not_count_are_told(self) -> None:
        drafted, guided, plain = (
            command("generate", f"sampler={name}", "gen_length=32", "show=none").out.splitlines()[-1]
            for name in ("freedave", "ar_guided", "learn2pd")
        )
        assert re.search(r"tokens/s  extra positions [1-9]\d+$", drafted)
        assert re.search(r"tokens/s  guide NFE [1-9]\d* in \d\.\d\d s$", guided)
        assert re.search(r"tokens/s$", plain)

    def test_long_lines_are_not_wrapped(self, run: Any) -> None:
        prompt = f"{QUESTION} {QUESTION}"
        assert run(f"prompt={prompt}", "show=none").out.splitlines()[0] == prompt

    def test_without_a_prompt_a_word_problem_of_the_seed_is_asked(self, run: Any) -> None:
        for seed in (0, 5):
            asked = run(f"seed={seed}", "show=none").out.splitlines()[0]
            assert asked == word_problems.problems(1, seed=seed)[0].question

    def test_show_none_prints_no_canvas(self, run: Any) -> None:
        lines = run(f"prompt={QUESTION}", "show=none").out.splitlines()
        assert len(lines) == 3
        assert lines[0] == QUESTION
        assert lines[2].startswith("NFE ")

    def test_sampler_options_and_all_others_take_effect(self, run: Any) -> None:
        result = run(
            f"prompt={QUESTION}", "sampler=threshold", "sampler.threshold=0.3", "temperature=0.7", "seed=4", "top_k=5",
            "top_p=0.9", "stop_at_eos=false", "eos_suppression=logits", "eos_token_id=3", "block_length=null",
            "show=none",
        )  # fmt: skip
        expected = dllm.generate(
            LM, QUESTION, dllm.samplers.Threshold(0.3), gen_length=12, block_length=None, temperature=0.7, seed=4,
            top_k=5, top_p=0.9, stop_at_eos=False, eos_suppression="logits", eos_token_id=3,
        )  # fmt: skip
        assert result.out.splitlines()[1] == expected.texts[0]
        assert result.out.splitlines()[2].startswith(f"NFE {expected.nfe[0]} ")
        plain = dllm.generate(LM, QUESTION, dllm.samplers.Threshold(0.3), gen_length=12, block_length=None, seed=4)
        assert plain.texts != expected.texts

    def test_chat_goes_through_the_template(self, run: Any) -> None:
        told = run(f"prompt={QUESTION}", "chat=true", "show=none").out.splitlines()
        expected = dllm.generate(LM, f"{QUESTION} So", gen_length=12, block_length=5)
        assert told[0] == QUESTION
        assert told[1] == expected.texts[0]
        assert told[1] != run(f"prompt={QUESTION}", "show=none").out.splitlines()[1]

    def test_a_picture_of_the_canvas_is_written(self, run: Any, tmp_path: Path) -> None:
        path = tmp_path / "new" / "canvas.svg"
        result = run("prompt=Tom has <5> pens & so on.", f"picture={path}", "show=none")
        drawn = "".join(ElementTree.parse(path).getroot().itertext()).replace("\xa0", " ")
        assert result.code == 0
        assert "Tom has <5> pens & so on." in drawn
        assert "step  1" in drawn
        assert result.out.splitlines()[1] in drawn

    def test_a_picture_is_written_even_if_nobody_reads_the_statistics(
        self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unread(*_: Any, **__: Any) -> None:
            raise BrokenPipeError

        monkeypatch.setattr(application, "_summary", unread)
        path = tmp_path / "canvas.svg"
        assert run("prompt=Tom", f"picture={path}", "cache=dual", "cache.measure_every=1", "show=none").code == 1
        assert path.is_file()

    def test_null_is_no_path(self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert run("prompt=Tom", "input=null", "output=null", "picture=null", "show=none").code == 0
        assert list(tmp_path.iterdir()) == []

    def test_a_seed_fixes_what_is_drawn(self, run: Any) -> None:
        hot = [
            run(f"prompt={QUESTION}", "temperature=1.5", f"seed={s}", "show=none").out.splitlines()[1]
            for s in (1, 1, 2)
        ]
        assert hot[0] == hot[1] != hot[2]

    def test_any_seed_will_do(self, run: Any) -> None:
        assert run("prompt=Tom", "seed=null", "show=none", "temperature=1").code == 0

    @pytest.mark.parametrize(
        "prompt",
        [
            "a, b, and c", "it's \"quoted\"", "'", "''", '"', "\\", "\\'", "\\\\'x\\", "x = y?", "a=b", "null", "true",
            "5", "???", "?", "${x}", "\\${x}", "${oc.env:HOME}", "$5 {a: 1}", "[1, 2]", "{", "a: b # c", "~x",
            " kept  spaces ",
            "two\nlines", "tab\there", "größer 😀", "--help", "a\\nb", "@x", "key=[a,b]", "x,", "choice(a,b)", "",
        ],
    )  # fmt: skip
    def test_any_text_survives_the_command_line(self, run: Any, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
        received = []
        monkeypatch.setattr(dllm, "load", lambda path, **options: LM)
        monkeypatch.setattr(application.Session, "answer_prompt", lambda self, text, *rest: received.append(text))
        assert run(f"prompt={prompt}") == Outcome(0, "", "")
        assert received == [prompt]

    @pytest.mark.parametrize("name", ["a, b", "it's", "x=y", "größer", "c:\\d", "[1]"])
    def test_any_path_survives_the_command_line(self, run: Any, questions: Path, tmp_path: Path, name: str) -> None:
        source, target = tmp_path / name / "q?.jsonl", tmp_path / f"{name} a" / "$1.jsonl"
        source.parent.mkdir()
        source.write_text(questions.read_text().splitlines()[4])
        assert run(f"input={source}", f"output={target}").code == 0
        assert len(rows(target)) == 1


class TestFile:
    def test_answers_are_those_of_the_api(self, run: Any, questions: Path, tmp_path: Path) -> None:
        output = tmp_path / "new" / "answers.jsonl"
        result = run(f"input={questions}", f"output={output}", "batch_size=4")
        prompts = [problem.question for problem in word_problems.problems(9, seed=1)]
        prompts[2], prompts[3], prompts[4] = f"{prompts[2]} So", f"{prompts[3]} So", "Tom"
        expected = dllm.generate(LM, prompts, gen_length=12, block_length=5)
        answers = by_id(output)
        assert set(answers) == {0, "one", 77, 3, 4, 5, 6, 7, 8}
        for row, name in enumerate((0, "one", 77, 3, 4, 5, 6, 7, 8)):
            completion = expected.completions[row].tolist()
            ends = [i + 1 for i, token in enumerate(completion) if token in LM.backbone.eos_token_ids]
            assert answers[name] == {
                "id": name, "text": expected.texts[row], "tokens": min([*ends, 12]), "nfe": int(expected.nfe[row]),
                "guide_nfe": 0,
            }  # fmt: skip
        assert result.code == 0
        cost, busy, told = result.out.splitlines()
        forwards, tokens = expected.nfe.sum().item(), sum(answer["tokens"] for answer in answers.values())
        assert cost == f"NFE {forwards / 9:.1f} per answer, {tokens / forwards:.2f} tokens per forward (TPF)"
        assert re.fullmatch(r"\d+ steps, row slots busy \d+\.\d%", busy)
        assert told == f"9 of 9 answers are in {output}"
        assert [line.split("  ")[0] for line in result.err.splitlines()] == [f"{n}/9" for n in range(1, 10)]

    def test_rows_are_written_as_they_finish(
        self, run: Any, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output, written, decode = tmp_path / "answers.jsonl", [], dllm.as_completed

        def watched(*arguments: Any, **options: Any) -> Iterator[dllm.Answer]:
            for answer in decode(*arguments, **options):
                written.append(len(rows(output)) if output.exists() else 0)
                yield answer

        monkeypatch.setattr(dllm, "as_completed", watched)
        assert run(f"input={questions}", f"output={output}", "batch_size=3", "show=none").err == ""
        assert written == list(range(9))

    @pytest.mark.parametrize("batch_size", [1, 2, 9])
    def test_the_batch_size_changes_nothing(
        self, run: Any, questions: Path, tmp_path: Path, batch_size: int, drawn: dict[str | int, dict[str, Any]]
    ) -> None:
        output = tmp_path / "answers.jsonl"
        run(f"input={questions}", f"output={output}", "temperature=0.9", "seed=3", f"batch_size={batch_size}")
        assert by_id(output) == drawn

    @pytest.fixture
    def drawn(self, run: Any, questions: Path, tmp_path: Path) -> dict[str | int, dict[str, Any]]:
        """The answers of an uninterrupted run at a temperature."""
        output = tmp_path / "drawn.jsonl"
        run(f"input={questions}", f"output={output}", "temperature=0.9", "seed=3", "batch_size=4")
        return by_id(output)

    @pytest.mark.parametrize("kept", [0, 1, 5, 8])
    def test_a_resumed_run_gives_what_an_uninterrupted_one_would(
        self, run: Any, questions: Path, tmp_path: Path, kept: int, drawn: dict[str | int, dict[str, Any]]
    ) -> None:
        output = tmp_path / "answers.jsonl"
        lines = (tmp_path / "drawn.jsonl").read_bytes().splitlines(keepends=True)
        output.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        result = run(f"input={questions}", f"output={output}", "temperature=0.9", "seed=3", "batch_size=2")
        assert output.read_bytes().startswith(b"".join(lines[:kept]))
        assert by_id(output) == drawn
        assert result.err.splitlines()[0].startswith(f"{kept + 1}/9  ")

    def test_a_finished_file_is_left_alone_and_no_model_loaded(
        self, run: Any, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "answers.jsonl"
        run(f"input={questions}", f"output={output}")
        before = output.read_bytes()
        monkeypatch.setattr(dllm, "load", None)
        assert run(f"input={questions}", f"output={output}") == Outcome(0, f"9 of 9 answers are in {output}\n", "")
        assert output.read_bytes() == before

    @in_a_process
    def test_a_killed_process_loses_and_repeats_nothing(self, model: Path, tmp_path: Path) -> None:
        source, output, whole = (tmp_path / name for name in ("q.jsonl", "killed.jsonl", "whole.jsonl"))
        asked = [problem.question for problem in word_problems.problems(40, seed=2)]
        source.write_text("".join(json.dumps({"id": f"é{i}", "prompt": text}) + "\n" for i, text in enumerate(asked)))
        arguments = [f"model={model}", f"input={source}", "gen_length=24", "temperature=0.8", "batch_size=4"]
        process = start("generate", *arguments, f"output={output}")
        deadline = time.monotonic() + 120
        while not (output.exists() and output.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        refused(command("generate", *arguments, f"output={output}"), f"is being written by process {process.pid} on ")
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed = output.read_bytes()
        kept = killed[: killed.rfind(b"\n") + 1]
        assert 3 <= kept.count(b"\n") < 40
        with output.open("ab") as file:  # as if the line had been cut within a character
            file.write('{"id": "é'.encode()[:-1])

        assert command("generate", *arguments, f"output={output}").code == 0
        assert command("generate", *arguments, f"output={whole}", "batch_size=16").code == 0
        assert output.read_bytes().startswith(kept)
        assert by_id(output) == by_id(whole)
        assert len(rows(output)) == 40


class TestTerminal:
    @in_a_process
    def test_the_canvas_and_the_progress_are_live(self, model: Path, questions: Path, tmp_path: Path) -> None:
        output = tmp_path / "answers.jsonl"
        short = [f"model={model}", "gen_length=12", "block_length=5"]
        single = Terminal("generate", *short, f"prompt={QUESTION}")
        several = Terminal("generate", *short, f"input={questions}", f"output={output}")
        drawn, answer = single.read(), dllm.generate(LM, QUESTION, gen_length=12, block_length=5).texts[0]
        assert "\x1b[2K" in drawn  # lines are drawn over
        plain = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", drawn)
        assert plain.startswith(QUESTION)
        assert plain.count("·") > 12
        assert not re.search(r"^ +\d+  ", plain, re.MULTILINE)
        assert plain.splitlines()[-2] == answer
        assert plain.splitlines()[-1].startswith("NFE ")
        progress = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", several.read())
        assert "9/9" in progress
        assert "━" in progress
        assert len(rows(output)) == 9


class TestProcess:
    def test_bad_input_leaves_with_2_from_a_clone_too(self, model: Path) -> None:
        script = [sys.executable, str(REPOSITORY / "scripts" / "generate.py")]
        done = subprocess.run([*script, f"model={model}", "gen_length=0"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("dllm generate: error: gen_length=0 ")
        assert len(done.stderr.splitlines()) == 1

    @in_a_process
    def test_a_reader_that_leaves_early_is_no_error(self, model: Path) -> None:
        process = start("generate", f"model={model}", f"prompt={QUESTION}", "gen_length=60")
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == f"{QUESTION}\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) in (0, 1)
        process.stderr.close()


BAD_OPTIONS = [
    (["gen_lenght=5"], "unknown option 'gen_lenght' (did you mean gen_length?); expected one of "),
    (["+extra=5"], "unknown option 'extra'; expected one of "),
    (["sampler.tempo=5"], "unknown option 'sampler.tempo'; "),
    (["+sampler.tempo=5"], "tempo"),
    (["model.speed=5"], "unknown option 'model.speed'; "),
    (["nonsense"], "unknown option 'nonsense'; options are written name=value"),
    (["--prompt", "x"], "unknown flag '--prompt'"),
    (["-x"], "unknown flag '-x'"),
    (["sampler=treshold"], "unknown sampler=treshold (did you mean threshold?); expected one of adablock, "),
    (["sampler=nope"], "unknown sampler=nope; expected one of adablock, anchored, ar_guided, "),
    (["cache=nope"], "unknown cache=nope; expected one of"),
    (["sampler=vanilla,threshold"], "sampler=vanilla,threshold names several"),
    (["gen_length=["], "["),
    (["model=no-such-model"], "'no-such-model'"),
    (["model=/no/such/folder"], "'/no/such/folder'"),
    (["model=/no/such, folder"], "'/no/such, folder'"),
    (["gen_length=0"], "gen_length=0"),
    (["gen_length=-3"], "gen_length=-3"),
    (["gen_length=1.5"], "gen_length=1.5"),
    (["gen_length=many"], "gen_length='many'"),
    (["gen_length="], "gen_length=''"),
    (["gen_length=null"], "gen_length=None"),
    (["gen_length=true"], "gen_length=True"),
    (["gen_length=[1]"], "gen_length=[1]"),
    (["block_length=0"], "block_length=0"),
    (["block_length=x"], "block_length='x'"),
    (["batch_size=0"], "batch_size=0"),
    (["batch_size=2.5"], "batch_size=2.5"),
    (["temperature=-1"], "temperature=-1"),
    (["temperature=hot"], "temperature='hot'"),
    (["temperature=nan"], "temperature=nan"),
    (["top_p=0"], "top_p=0"),
    (["top_p=1.1"], "top_p=1.1"),
    (["top_p=x"], "top_p='x'"),
    (["top_k=0"], "top_k=0"),
    (["top_k=1.5"], "top_k=1.5"),
    (["cfg_scale=-0.5"], "cfg_scale=-0.5"),
    (["cfg_scale=x"], "cfg_scale='x'"),
    (["seed=-1"], "seed=-1"),
    (["seed=99999999999999999999"], "seed=99999999999999999999"),
    (["seed=x"], "seed='x'"),
    (["seed=[1]"], "seed=[1]"),
    (["stop_at_eos=5"], "stop_at_eos=5"),
    (["eos_token_id=x"], "eos_token_id='x'"),
    (["eos_token_id=[1,x]"], "eos_token_id=[1, 'x']"),
    (["eos_suppression=both of them"], "eos_suppression='both of them'"),
    (["chat=maybe"], "chat='maybe'"),
    (["prompt=\udcff"], "prompt='\\udcff' is not valid UTF-8"),
    (["show=film"], "unknown show='film'; expected one of auto, live, lines, none"),
    (["sampler.tokens_per_step=0"], "tokens_per_step=0"),
    (["sampler.tokens_per_step=x"], "sampler.tokens_per_step='x'"),
    (["sampler.tokens_per_step=true"], "sampler.tokens_per_step=True"),
    (["top_p=true"], "top_p=True"),
    (["sampler.order=up"], "sampler.order='up'"),
    (["sampler.steps=3", "sampler.tokens_per_step=2"], "mutually exclusive"),
    (["sampler.steps=13"], "steps=13"),
    (["sampler=threshold", "sampler.threshold=-1"], "threshold=-1"),
    (["sampler=threshold", "sampler.threshold=x"], "sampler.threshold='x'"),
    (["sampler=factor", "sampler.factor=0"], "factor=0"),
    (["sampler=entropy_threshold", "sampler.threshold=-1"], "threshold=-1"),
    (["model.device=nonsense"], "device='nonsense'"),
    (["model.dtype=int3"], "dtype='int3'"),
    (["model.dtype=3"], "model.dtype=3"),
    (["model.attn_implementation=x"], "attn_implementation='x'"),
    (["model.revision=main"], "revision='main'"),
    (["picture=canvas.png"], "picture='canvas.png'"),
    (["input=questions.jsonl"], "belong together"),
    (["output=answers.jsonl"], "belong together"),
    (["gen_length=80"], "context of 96"),
]


def refused(result: Outcome, named: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("dllm generate: error: ")
    assert result.err.count("\n") == 1
    assert named in result.err


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(("arguments", "named"), BAD_OPTIONS, ids=[" ".join(case[0]) for case in BAD_OPTIONS])
    def test_a_bad_option_is_named_in_one_line_and_nothing_is_written(
        self, run: Any, tmp_path: Path, arguments: list[str], named: str
    ) -> None:
        prompt = [] if any(a.startswith(("input", "output")) for a in arguments) else [f"prompt={QUESTION}"]
        refused(run(*prompt, *arguments), named)
        assert list(tmp_path.iterdir()) == []

    def test_a_custom_model_needs_a_path(self) -> None:
        refused(
            command("generate", "model=custom", "prompt=Tom"), "model.path has no value; set it with model.path=..."
        )

    @pytest.mark.parametrize("where", ["{here}", "{here}/file/answers.jsonl", "/dev/null/a", "{here}/" + "x" * 300])
    @pytest.mark.parametrize("option", ["output", "picture"])
    def test_a_path_that_cannot_be_written_is_refused_before_anything_is_decoded(
        self, run: Any, questions: Path, tmp_path: Path, where: str, option: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dllm, "load", None)
        (tmp_path / "file").touch()
        path = where.format(here=tmp_path) + (".svg" if option == "picture" else "")
        (tmp_path.parent / f"{tmp_path.name}.svg").mkdir()
        refused(run(f"{option}={path}", *([f"input={questions}"] if option == "output" else [])), str(path))

    @pytest.mark.parametrize("name", ["missing.jsonl", ".", "bytes"])
    def test_an_unreadable_input_is_refused(self, run: Any, tmp_path: Path, name: str) -> None:
        (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
        refused(run(f"input={name}", "output=answers.jsonl"), f"input='{name}' cannot be read")
        assert not (tmp_path / "answers.jsonl").exists()

    @pytest.mark.parametrize(
        ("line", "named"),
        [
            ("{", "line 3 is not JSON"),
            ('{"id": "x"}', "line 3 needs either a prompt or messages"),
            ('{"id": 1, "prompt": "Sam"}', "line 3: id 1 occurs twice"),
            ('{"id": "long", "prompt": "' + "Tom has " * 60 + '"}', "line 3 (id 'long') has 121 tokens"),
            ('{"prompt": "' + "Tom has " * 60 + '"}', "line 3 has 121 tokens"),
            ('{"id": "m", "prompt": "Tom <|mdm_mask|>"}', "line 3 (id 'm') contains [MASK]"),
        ],
        ids=["broken", "no prompt", "same id", "too long", "too long without id", "mask"],
    )
    def test_a_bad_line_of_the_input_is_named(self, run: Any, tmp_path: Path, line: str, named: str) -> None:
        (tmp_path / "q.jsonl").write_text(f'{{"prompt": "Tom"}}\n{{"prompt": "Ann"}}\n{line}\n')
        refused(run("input=q.jsonl", "output=a/a.jsonl"), f"input='q.jsonl' {named}")
        assert not (tmp_path / "a").exists()

    def test_a_bad_line_is_named_when_answers_are_there_already(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "q.jsonl").write_text(
            '{"prompt": "Tom"}\n{"prompt": "Ann"}\n{"prompt": "' + "Tom has " * 60 + '"}\n'
        )
        (tmp_path / "a.jsonl").write_text('{"id": 0, "text": ""}\n{"id": 1, "te')
        refused(run("input=q.jsonl", "output=a.jsonl"), "line 3 has 121 tokens")
        assert (tmp_path / "a.jsonl").read_text() == '{"id": 0, "text": ""}\n{"id": 1, "te'

    @pytest.mark.parametrize("argument", ["prompt=Tom", "picture=x.svg"])
    def test_what_would_be_ignored_beside_input_is_refused(self, run: Any, questions: Path, argument: str) -> None:
        refused(
            run(f"input={questions}", "output=a.jsonl", argument),
            f"{argument.split('=')[0]} and input are mutually exclusive",
        )

    def test_an_output_of_something_else_is_left_alone(self, run: Any, questions: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.jsonl").write_text("notes\n")
        refused(run(f"input={questions}", "output=notes.jsonl"), "output='notes.jsonl' has content other")
        refused(run(f"input={questions}", f"output={questions}"), "is the input itself")
        (tmp_path / "other.jsonl").write_text('{"id": "other", "text": ""}\n')
        refused(run(f"input={questions}", "output=other.jsonl"), "'other'")
        assert (tmp_path / "notes.jsonl").read_text() == "notes\n"

    def test_steps_that_only_the_sampler_can_refuse_leave_no_file(
        self, run: Any, questions: Path, tmp_path: Path
    ) -> None:
        refused(run(f"input={questions}", "output=a/a.jsonl", "sampler.steps=99"), "steps=99 is out of range")
        assert not (tmp_path / "a").exists()

    def test_text_needs_a_tokenizer(self, model: Path, questions: Path, tmp_path: Path) -> None:
        bare = tmp_path / "bare"
        shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
        refused(command("generate", f"model={bare}", "prompt=Tom"), "prompt is text, and this model has no tokenizer")
        told = command("generate", f"model={bare}", f"input={questions}", "output=a.jsonl")
        refused(told, f"input='{questions}' line 1 is text, and this model has no tokenizer")
        assert not (tmp_path / "a.jsonl").exists()

    def test_chat_needs_a_template_that_takes_the_message(self, model: Path, tmp_path: Path) -> None:
        bare = tmp_path / "bare"
        shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.jinja"))
        refused(command("generate", f"model={bare}", "prompt=Tom", "chat=true"), "no chat template")
        (bare / "chat_template.jinja").write_text("{{ raise_exception('no system messages') }}")
        told = command("generate", f"model={bare}", "prompt=Tom", "chat=true")
        refused(told, "prompt does not fit the chat template: no system messages")
        (tmp_path / "q.jsonl").write_text(
            json.dumps({"prompt": "Tom"}) + "\n" + json.dumps({"id": "c", "messages": CHAT})
        )
        told = command("generate", f"model={bare}", "input=q.jsonl", "output=a.jsonl")
        refused(told, "line 2 (id 'c') does not fit the chat template")

    def test_a_broken_model_folder_is_named(self, model: Path, tmp_path: Path) -> None:
        shutil.copytree(model, tmp_path / "broken")
        (tmp_path / "broken" / "config.json").write_text("{")
        refused(command("generate", f"model={tmp_path}/broken", "prompt=Tom"), "config.json is not JSON")
