"""`dllm generate` with input and output: which answers are kept, and what is told of those that are not."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm
from commands import Outcome, command
from dllm.evaluation import claim
from dllm.evaluation.answer_manifest import MANIFEST, AnswerManifest, describe, differences, told
from dllm.files import BUNDLED
from models import random_llada

MODELS = {
    "tiny-llada": random_llada(tokenizer=True, seed=1, max_length=96),
    "tiny-dream": random_llada(tokenizer=True, seed=2, max_length=96),
}
ASKED = ["Tom", "Ann has 3 pens.", "Sam has 5 pens. He loses 2."]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dllm, "load", lambda path, **_: MODELS[path])
    monkeypatch.setattr(claim.Claim.__init__, "__defaults__", (0.0,))


def ask(*rows: dict[str, Any] | str) -> None:
    written = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))


def run(*arguments: str) -> Outcome:
    return command("generate", "input=q.jsonl", "output=a.jsonl", "gen_length=8", "block_length=4", *arguments)


def lines() -> list[bytes]:
    return Path("a.jsonl").read_bytes().splitlines(keepends=True)


def keep(count: int) -> None:
    Path("a.jsonl").write_bytes(b"".join(lines()[:count]))


def manifest() -> dict[str, Any]:
    return json.loads(Path("a.jsonl.manifest.json").read_text())


def refused(result: Outcome, *named: str) -> str:
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert result.err.startswith("dllm generate: error: ")
    for part in named:
        assert part in result.err
    return result.err


@pytest.fixture
def answered() -> bytes:
    """Three questions without ids, of which the first two have answers."""
    ask(*ASKED)
    assert run().code == 0
    keep(2)
    return Path("a.jsonl").read_bytes()


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded is an error."""
    monkeypatch.setattr(dllm, "load", None)


class TestPrompts:
    def test_a_line_put_in_front_is_refused(self, answered: bytes, unloaded: None) -> None:
        ask("Mia", *ASKED)
        refused(run(), "input='q.jsonl' line 1 is not the prompt that output='a.jsonl' answers", "those of 1 other")
        assert Path("a.jsonl").read_bytes() == answered

    @pytest.mark.parametrize(
        "changed",
        [
            {"prompt": "Ann has 4 pens."},
            {"prompt": "Ann has 3 pens. "},
            {"messages": [{"role": "user", "content": "Ann has 3 pens."}]},
        ],
    )
    @pytest.mark.parametrize("mixed", [[], ["resume=mixed"]])
    def test_another_prompt_under_an_answered_id_is_refused(
        self, changed: dict[str, Any], mixed: list[str], unloaded: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dllm, "load", lambda path, **_: MODELS[path])
        ask({"id": "x", "prompt": "Tom"}, {"id": "y", "prompt": "Ann has 3 pens."})
        run()
        before = lines()
        monkeypatch.setattr(dllm, "load", None)
        ask({"id": "x", "prompt": "Tom"}, {"id": "y"} | changed, {"id": "z", "prompt": "new"})
        refused(run(*mixed), "input='q.jsonl' line 2 (id 'y') is not the prompt that output='a.jsonl' answers")
        assert lines() == before

    def test_other_order_new_ids_and_changes_without_an_answer_are_taken(self) -> None:
        ask({"id": 1, "prompt": "Tom"}, {"id": "1", "prompt": "Ann"}, {"id": "z", "prompt": "Sam"})
        run()
        keep(2)
        kept = lines()
        ids = [json.loads(line)["id"] for line in kept]
        texts = {1: "Tom", "1": "Ann", "z": "Sam"}
        left = next(name for name in texts if name not in ids)
        rows = [{"id": name, "prompt": texts[name] if name in ids else "Max"} for name in reversed(texts)]
        ask({"id": "new", "prompt": "Eve"}, *rows)
        assert run().code == 0
        assert lines()[:2] == kept
        assert {json.loads(line)["id"] for line in lines()} == {1, "1", "z", "new"}
        assert set(manifest()["prompts"]) == {"1", '"1"', '"z"', '"new"'}
        ask({"id": left, "prompt": texts[left]}, *(row for row in rows if row["id"] != left), "Eve")
        refused(run())

    def test_an_id_that_is_gone_from_the_input_is_refused(self, answered: bytes, unloaded: None) -> None:
        ask("Tom")
        refused(run(), "output='a.jsonl' answers 1, which is not in input")


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "before", "now"),
        [
            (["gen_length=4"], "gen_length=8", "gen_length=4"),
            (["temperature=0.5", "seed=3"], "temperature=0.0, seed=0", "temperature=0.5, seed=3"),
            (["sampler=threshold"], "sampler=vanilla", "sampler=threshold"),
            (["sampler.steps=4"], "sampler.steps=null", "sampler.steps=4"),
            (["cache=dual"], "cache=none", "cache=dual"),
            (["chat=true"], "chat=false", "chat=true"),
            (["stop_at_eos=false"], "stop_at_eos=true", "stop_at_eos=false"),
        ],
    )
    def test_options_that_change_answers_are_named(
        self, answered: bytes, unloaded: None, arguments: list[str], before: str, now: str
    ) -> None:
        told = f"output='a.jsonl' was made with {before}; this run has {now}: give another output, or resume=mixed"
        refused(run(*arguments), told)
        assert Path("a.jsonl").read_bytes() == answered

    @pytest.mark.parametrize(
        ("before", "now"),
        [
            ({}, {"const": None}),
            ({"const": True}, {"const": 1}),
            ({"enum": [{"a.b": 1}]}, {"enum": [{"a": {"b": 1}}]}),
            ({"const": {"a.b": 1}}, {"const": {"a": {"b": 1}}}),
            ({"properties": {"a": {}, "b": {}}}, {"properties": {"b": {}, "a": {}}}),
        ],
    )
    def test_a_format_counts_as_a_whole(self, before: Any, now: Any) -> None:
        asked = [json.dumps({"type": "json_schema", "schema": schema}) for schema in (before, now)]
        fields, other = (
            {"cache": {}, "sampler": {}, "model": {"path": "m"}, "response_format": json.loads(each)} for each in asked
        )
        sessions = [describe(each, {"sampler": "s", "cache": "c"}, {}) for each in (fields, other)]
        assert differences(sessions[0]["options"], sessions[1]["options"]) == ["response_format"]
        assert differences(sessions[0]["options"], json.loads(json.dumps(sessions[0]))["options"]) == []
        assert [told("response_format", each) for each in sessions] == [f"response_format={each}" for each in asked]

    def test_another_format_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ask("Tom")
        for name, schema in (("any", {}), ("null", {"const": None})):
            Path(f"{name}.json").write_text(json.dumps({"type": "json_schema", "schema": schema}))
        assert run("response_format=any.json").code == 0
        monkeypatch.setattr(dllm, "load", None)
        assert run("response_format=any.json").out == "1 of 1 answers are in a.jsonl\n"
        made = 'response_format={"type": "json_schema", "schema": {}}; '
        refused(
            run("response_format=null.json"), made, 'this run has response_format={"type": "json_schema", "schema": {"c'
        )
        refused(run(), made, "this run has response_format=null: give another output")

        # As recorded by earlier versions.
        old = manifest()
        del old["sessions"][0]["options"]["response_format"]
        old["sessions"][0]["options"]["response_format.type"] = "json_schema"
        Path("a.jsonl.manifest.json").write_text(json.dumps(old))
        for asked in ("any.json", "null.json", "null"):
            refused(
                run(f"response_format={asked}"), "response_format=(recorded in parts by an earlier version); this run"
            )

    def test_a_finished_file_of_other_options_is_refused_too(self, unloaded: None, monkeypatch: Any) -> None:
        monkeypatch.setattr(dllm, "load", lambda path, **_: MODELS[path])
        ask(*ASKED)
        run()
        monkeypatch.setattr(dllm, "load", None)
        refused(run("sampler=factor"), "sampler=vanilla", "sampler=factor")
        assert run() == Outcome(0, "3 of 3 answers are in a.jsonl\n", "")

    def test_options_that_change_nothing_are_no_others(self, answered: bytes) -> None:
        done = run("batch_size=1", "show=none", "cuda_graphs=false", "model.device=cpu", "model.pack=false")
        assert done.out.endswith("3 of 3 answers are in a.jsonl\n")
        assert Path("a.jsonl").read_bytes().startswith(answered)
        assert [each["answers"] for each in manifest()["sessions"]] == [0, 2]
        assert " per new answer, " in done.out

    def test_mixed_keeps_them_and_tells_every_session(self, answered: bytes) -> None:
        assert run("gen_length=4", "resume=mixed").code == 0
        assert Path("a.jsonl").read_bytes().startswith(answered)
        assert len(lines()) == 3
        sessions = manifest()["sessions"]
        assert [(each["answers"], each["options"]["gen_length"]) for each in sessions] == [(0, 8), (2, 4)]
        assert sessions[0]["names"] == {"sampler": "vanilla", "cache": "none"}
        assert sessions[0]["dllm"]
        # Neither setting made all of them.
        refused(run("gen_length=4"), "gen_length=8", "gen_length=4")
        refused(run(), "gen_length=4", "gen_length=8")
        assert run("gen_length=4", "resume=mixed").out == "3 of 3 answers are in a.jsonl\n"

    def test_any_seed_goes_on_with_the_seed_that_was_drawn(self) -> None:
        ask(*ASKED)
        hot = ("temperature=1.5", "seed=null")
        run(*hot)
        whole = {json.loads(line)["id"]: line for line in lines()}
        keep(1)
        assert run(*hot).code == 0
        assert {json.loads(line)["id"]: line for line in lines()} == whole
        refused(run("temperature=1.5", "seed=0"), f"seed={manifest()['sessions'][0]['options']['seed']}", "seed=0")

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["resume=all"], "unknown resume='all'; expected one of null, mixed"),
            (["resume=5"], "resume=5"),
            (["input=null", "output=null", "resume=mixed"], "resume=mixed needs input and output"),
        ],
    )
    def test_other_values_of_resume_are_refused(self, arguments: list[str], named: str) -> None:
        ask(*ASKED)
        refused(run(*arguments), named)

    def test_a_filter_is_known_by_content_and_card_wherever_it_is_given(self, monkeypatch: Any, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        for end in (".safetensors", ".json"):
            shutil.copy(BUNDLED / "tiny-llada" / f"learn2pd{end}", tmp_path / f"f{end}")
        ask(*ASKED)
        options = ("sampler=learn2pd", "sampler.filter='~/f.safetensors'", "sampler.allow_mismatch=true")
        assert run(*options).code == 0
        keep(2)
        card = tmp_path / "f.json"
        card.write_text(f"{card.read_text()} ")
        refused(run(*options), "was made with files of sampler=", "this run has files of sampler=")


class TestModels:
    @pytest.mark.parametrize("kept", [2, 3])
    def test_another_model_is_refused(self, kept: int) -> None:
        ask(*ASKED)
        run()
        keep(kept)
        before = lines()
        refused(run("model=tiny-dream"), "was made with model=tiny-llada; this run has model=tiny-dream: give another")
        assert lines() == before
        assert run("model=tiny-dream", "resume=mixed").code == 0

    def test_other_weights_under_the_same_name_are_refused(self, answered: bytes, monkeypatch: Any) -> None:
        monkeypatch.setitem(MODELS, "tiny-llada", MODELS["tiny-dream"])
        refused(run(), "was made with weights=", "this run has weights=")

    def test_other_precision_is_refused(self, answered: bytes, monkeypatch: Any) -> None:
        lm = random_llada(tokenizer=True, seed=1, max_length=96, dtype=torch.float32)
        monkeypatch.setitem(MODELS, "tiny-llada", lm)
        refused(run(), "model.dtype=float64; this run has", "model.dtype=float32: give")

    def test_the_same_weights_under_another_name_go_on(self, answered: bytes, monkeypatch: Any) -> None:
        monkeypatch.setitem(MODELS, "tiny-dream", MODELS["tiny-llada"])
        assert run("model=tiny-dream").code == 0
        assert run("model=tiny-dream").out == "3 of 3 answers are in a.jsonl\n"

    def test_weights_that_change_under_a_finished_file_are_noticed(self, tmp_path: Path, monkeypatch: Any) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "weights").write_text("1")
        monkeypatch.setitem(MODELS, str(folder), MODELS["tiny-llada"])
        ask(*ASKED)
        assert run(f"model={folder}").code == 0
        (folder / "weights").write_text("22")
        monkeypatch.setitem(MODELS, str(folder), MODELS["tiny-dream"])
        refused(run(f"model={folder}"), "was made with weights=")

    def test_another_adapter_of_a_finished_file_is_noticed(self, tmp_path: Path, monkeypatch: Any) -> None:
        for name in "xy":
            (tmp_path / name).mkdir()
            (tmp_path / name / "adapter_config.json").write_text("{}")
            (tmp_path / name / "adapter_model.safetensors").write_text(name)
        lm = MODELS["tiny-llada"]

        def load(path: str, adapter: str | None = None, **_: Any) -> dllm.LanguageModel:
            return lm if adapter is None else replace(lm, folder=tmp_path, adapter=Path(adapter))

        monkeypatch.setattr(dllm, "load", load)
        ask(*ASKED)
        assert run(f"model.adapter={tmp_path}/x").code == 0
        assert run(f"model.adapter={tmp_path}/x").code == 0
        refused(run(f"model.adapter={tmp_path}/y"), "was made with adapter=", "this run has adapter=")
        refused(run(), "was made with", "adapter=")
        (tmp_path / "x" / "adapter_model.safetensors").write_text("z")
        refused(run(f"model.adapter={tmp_path}/x"), "was made with adapter=")


class TestManifestFile:
    def test_answers_from_before_there_were_manifests_are_kept_and_it_is_told(self, answered: bytes) -> None:
        Path("a.jsonl.manifest.json").unlink()
        told = "2 answers are older than a.jsonl.manifest.json: their prompts and options are unknown"
        done = run()
        assert done.code == 0
        assert done.out.splitlines()[2:] == [told, "3 of 3 answers are in a.jsonl"]
        assert Path("a.jsonl").read_bytes().startswith(answered)
        assert run().out == f"{told}\n3 of 3 answers are in a.jsonl\n"
        assert run("resume=mixed").out == "3 of 3 answers are in a.jsonl\n"
        ask("Mia", *ASKED)
        refused(run(), "line 1 is not the prompt")

    @pytest.mark.parametrize(
        "content",
        [
            "", "{", "[]", "{}",
            '{"format": "dllm-manifest", "version": 1}', '{"format": "dllm-answers", "version": 2}',
            '{"format": "dllm-answers", "version": 1}',
            '{"format": "dllm-answers", "version": 1, "prompts": {}, "sessions": [5]}',
            '{"format": "dllm-answers", "version": 1, "prompts": [], "sessions": []}',
            '{"format": "dllm-answers", "version": 1, "prompts": {}, "sessions": [{"answers": "x"}]}',
            '{"format": "dllm-answers", "version": 1, "prompts": {}, "sessions": [{"options": {"seed": "x"}}]}',
        ],
    )  # fmt: skip
    def test_another_file_in_its_place_is_refused_and_left_alone(self, unloaded: None, content: str) -> None:
        ask(*ASKED)
        Path("a.jsonl.manifest.json").write_text(content)
        refused(run("resume=mixed"), "a.jsonl.manifest.json", "give another output, or remove it")
        assert Path("a.jsonl.manifest.json").read_text() == content
        assert not Path("a.jsonl").exists()

    def test_a_new_start_after_the_answers_were_removed(self, answered: bytes) -> None:
        Path("a.jsonl").unlink()
        ask("Mia")
        assert run("gen_length=4").code == 0
        assert len(manifest()["sessions"]) == len(manifest()["prompts"]) == 1

    def test_it_is_there_before_the_first_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def die(*_: Any) -> None:
            assert len(manifest()["prompts"]) == 3
            raise OSError("killed here")

        ask(*ASKED)
        monkeypatch.setattr(dllm.evaluation.jsonl.AnswerFile, "_open", die)
        refused(run(), "killed here")

    def test_a_session_that_ended_before_its_first_answer_does_not_count(
        self, answered: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(
                dllm.evaluation.jsonl.AnswerFile, "_open", lambda self: (_ for _ in ()).throw(OSError("killed"))
            )
            refused(run("gen_length=4", "resume=mixed"), "killed")
        assert [each["options"]["gen_length"] for each in manifest()["sessions"]] == [8, 4]
        assert run().code == 0
        assert [each["options"]["gen_length"] for each in manifest()["sessions"]] == [8, 8]

    def test_a_session_whose_number_of_answers_comes_back_still_counts(self, answered: bytes) -> None:
        assert run("gen_length=4", "resume=mixed").code == 0
        Path("a.jsonl").write_bytes(b"".join(lines()[1:]))  # two are left, as there were when that session began
        refused(run(), "was made with gen_length=4; this run has gen_length=8")

    def test_what_cannot_be_written_is_told_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise OSError("No space left on device")

        ask(*ASKED)
        monkeypatch.setattr(dllm.evaluation.answer_manifest, "write_json", refuse)
        refused(run(), "output='a.jsonl': a.jsonl.manifest.json cannot be written beside it (No space left")
        assert not Path("a.jsonl").exists()


class TestFiles:
    @pytest.mark.parametrize("content", [b"notes", b'{"prompt": "Tom"}', b"\0\1\2"])
    def test_a_file_that_is_not_ours_is_refused_before_the_model_loads(self, unloaded: None, content: bytes) -> None:
        ask(*ASKED)
        Path("a.jsonl").write_bytes(content)
        refused(run(), "output='a.jsonl' has content other than answers; give another file")
        assert Path("a.jsonl").read_bytes() == content
        assert sorted(each.name for each in Path().iterdir()) == ["a.jsonl", "q.jsonl"]

    @pytest.mark.parametrize("kind", ["hard", "symbolic"])
    def test_a_link_to_the_input_is_the_input(self, unloaded: None, kind: str) -> None:
        ask(*ASKED)
        before = Path("q.jsonl").read_bytes()
        (Path.hardlink_to if kind == "hard" else Path.symlink_to)(Path("a.jsonl"), Path("q.jsonl").absolute())
        refused(run(), "output='a.jsonl' is the input itself")
        assert Path("q.jsonl").read_bytes() == before

    @pytest.mark.parametrize(
        ("output", "why"),
        [("/dev/null", "is not an ordinary file"), ("/dev/stdout", "is not an ordinary file"),
         ("fifo", "cannot be written (it is a pipe)"), ("loop", "cannot be written (Too many levels")],
    )  # fmt: skip
    def test_an_output_that_cannot_be_read_again_is_refused(self, unloaded: None, output: str, why: str) -> None:
        os.mkfifo("fifo")
        Path("loop").symlink_to("loop")
        ask(*ASKED)
        refused(run(f"output={output}"), f"output='{output}' {why}")

    def test_a_pipe_in_place_of_the_manifest_is_refused(self, unloaded: None) -> None:
        os.mkfifo(f"a.jsonl{MANIFEST}")
        ask(*ASKED)
        refused(run(), f"a.jsonl{MANIFEST} is no ordinary file, where a file belongs; give another output")

    def test_an_input_that_can_be_read_once_is_enough(self) -> None:
        ask(*ASKED)
        text = Path("q.jsonl").read_bytes()
        reader, writer = os.pipe()
        os.write(writer, text)
        os.close(writer)
        assert run(f"input=/dev/fd/{reader}").code == 0
        os.close(reader)
        whole = lines()
        keep(1)
        assert run().code == 0
        assert sorted(lines()) == sorted(whole)

    def test_an_input_that_changes_during_the_run_is_noticed_by_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decode = dllm.as_completed

        def changed(*arguments: Any, **options: Any) -> Iterator[dllm.Answer]:
            ask("Mia", *ASKED[1:])
            return decode(*arguments, **options)

        ask(*ASKED)
        with monkeypatch.context() as patch:
            patch.setattr(dllm, "as_completed", changed)
            assert run().code == 0
        refused(run(), "line 1 is not the prompt")

    @pytest.fixture
    def meanwhile(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Do something after the second answer."""

        def arrange(act: Any) -> None:
            decode = dllm.as_completed

            def watched(*arguments: Any, **options: Any) -> Iterator[dllm.Answer]:
                for count, answer in enumerate(decode(*arguments, **options)):
                    if count == 2:
                        act()
                    yield answer

            monkeypatch.setattr(dllm, "as_completed", watched)

        return arrange

    def test_a_second_writer_is_refused_and_told_who_writes(self, meanwhile: Any) -> None:
        told: list[Outcome] = []
        meanwhile(lambda: told.append(run()))
        ask(*ASKED)
        assert run().code == 0
        said = refused(told[0], "output='a.jsonl' is being written by process", str(os.getpid()))
        assert "dllm generate" in said
        assert len(lines()) == 3
        assert sorted(each.name for each in Path().iterdir()) == ["a.jsonl", "a.jsonl.manifest.json", "q.jsonl"]

    def test_an_output_removed_during_the_run_is_told_with_what_is_lost(self, meanwhile: Any) -> None:
        meanwhile(lambda: Path("a.jsonl").unlink())
        ask(*ASKED)
        done = run("batch_size=1")
        assert (done.code, done.out) == (2, "")
        told = "was removed by another program during this run, 2 answers are lost or changed (0, 1)"
        assert f"output='a.jsonl' {told}" in done.err

    def test_a_full_disk_is_told_and_the_run_goes_on_later(self, meanwhile: Any, monkeypatch: Any) -> None:
        ask(*ASKED)
        run()
        whole = sorted(lines())
        keep(0)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def fill() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (Path("a.jsonl").stat().st_size + 9, before[1]))

        decode = dllm.as_completed
        meanwhile(fill)
        try:
            done = run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (done.code, done.out) == (2, "")
        assert re.search(
            r"error: output='a.jsonl' cannot be written \(.*\), 2 answers are in it; free disk space", done.err
        )
        assert len(lines()) == 2
        monkeypatch.setattr(dllm, "as_completed", decode)
        assert run().code == 0
        assert sorted(lines()) == whole


def test_the_manifest_lies_beside_the_file_and_not_beside_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    with dllm.evaluation.jsonl.AnswerFile(tmp_path / "link.jsonl") as answers:
        assert AnswerManifest(answers, mixed=False).path == tmp_path / "real.jsonl.manifest.json"


class TestAnswersOfOthers:
    @pytest.fixture
    def both(self) -> dict[str, bytes]:
        """Two finished runs, of other seeds, whose manifest is the second one's."""
        found = {}
        for seed in ("1", "2"):
            ask(*ASKED)
            Path("a.jsonl").unlink(missing_ok=True)
            assert run(f"seed={seed}", "temperature=1").code == 0
            found[seed] = Path("a.jsonl").read_bytes()
        assert found["1"] != found["2"]
        return found

    def again(self, *more: str) -> Outcome:
        return run("seed=2", "temperature=1", *more)

    @pytest.mark.parametrize("left", [1, 3])
    def test_the_file_of_another_run_is_refused(self, both: dict[str, bytes], left: int, unloaded: None) -> None:
        Path("a.jsonl").write_bytes(both["1"])
        keep(left)
        refused(self.again(), f"has {left} answers (the first one: 0)", "a.jsonl.manifest.json", "resume=mixed")
        assert len(lines()) == left

    def test_lines_added_from_another_run_are_refused(self, both: dict[str, bytes], unloaded: None) -> None:
        row = json.loads(lines()[0]) | {"id": 3}
        Path("a.jsonl").write_bytes(both["2"] + json.dumps(row).encode() + b"\n")
        ask(*ASKED, "Mia")
        refused(self.again(), "has 1 answers (the first one: 3)")

    def test_they_are_kept_where_that_is_asked_for(self, both: dict[str, bytes]) -> None:
        Path("a.jsonl").write_bytes(both["1"])
        assert self.again("resume=mixed").code == 0
        assert Path("a.jsonl").read_bytes() == both["1"]

    @pytest.mark.parametrize("left", [b"", b'{"id": 2, "te'])
    def test_what_an_interrupted_run_left_goes_on(self, both: dict[str, bytes], left: bytes) -> None:
        keep(2)
        Path("a.jsonl").write_bytes(Path("a.jsonl").read_bytes() + left)
        before = manifest() | {"answers": {}, "ended": False}  # as a run that was killed leaves it
        Path("a.jsonl.manifest.json").write_text(json.dumps(before))
        assert self.again().code == 0
        assert sorted(lines()) == sorted(both["2"].splitlines(keepends=True))
        assert (manifest()["ended"], len(manifest()["answers"])) == (True, 3)
