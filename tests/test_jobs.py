"""Jobs: many rows into a folder of shards, each row once, whatever happens on the way."""

from __future__ import annotations

import errno
import inspect
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from omegaconf import OmegaConf
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import dllm
import kills
from commands import Outcome, command, in_a_process, start
from dllm import identity, jobs
from dllm.evaluation import claim
from dllm.evaluation.claim import Claim
from dllm.jobs import folder as job_folder
from dllm.samplers import Learn2PD
from models import random_llada

ROOT = Path(__file__).parents[1]
MODELS = {
    name: random_llada(tokenizer=True, seed=seed, max_length=96).backbone.double()
    for seed, name in enumerate(("tiny-llada", "tiny-dream"))
}
LMS = {
    name: dllm.LanguageModel(backbone, random_llada(tokenizer=True).tokenizer, name)
    for name, backbone in MODELS.items()
}
WORDS = "Tom Ann Sam Mia has buys loses 2 3 5 pens apples . He She".split()
ROWS = [
    {"id": f"r{n}", "prompt": " ".join(WORDS[(n * k + 1) % len(WORDS)] for k in range(1, 3 + n % 5))} for n in range(23)
]
COLUMNS = ["id", "text", "tokens", "nfe", "guide_nfe", "error"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dllm, "load", lambda path, **_: LMS[path])
    monkeypatch.setattr(claim.Claim.__init__, "__defaults__", (0.0,))


def lines(path: str | Path, rows: list[Any]) -> None:
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*arguments: str, source: str = "q.jsonl", output: str = "out", size: int = 4) -> Outcome:
    plain = ("gen_length=8", "block_length=4", "sampler=threshold", "show=none", f"engine.shard_rows={size}")
    return command("generate", f"input={source}", f"output={output}", *plain, *arguments)


def made(output: str = "out") -> list[dict[str, Any]]:
    """All rows, in the order of the shards."""
    return parquet.read_table(output).to_pylist()


def names(output: str = "out") -> list[str]:
    return sorted(path.name for path in Path(output).iterdir())


def refused(result: Outcome, *named: str) -> None:
    assert (result.code, result.out) == (2, ""), result
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("dllm generate: error: ")
    for part in named:
        assert part in result.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What an undisturbed job makes of all rows."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dllm, "load", lambda path, **_: LMS[path])
        lines(folder / "q.jsonl", ROWS)
        assert run(source=f"{folder}/q.jsonl", output=f"{folder}/out").code == 0
    return made(f"{folder}/out")


class TestOutput:
    def test_shards_in_order_are_the_rows_of_the_input(self, whole: list[dict[str, Any]]) -> None:
        assert list(whole[0]) == COLUMNS
        assert [row["id"] for row in whole] == [row["id"] for row in ROWS]
        assert {row["error"] for row in whole} == {None}

    def test_answers_are_those_of_the_interface(self, whole: list[dict[str, Any]]) -> None:
        prompts = [row["prompt"] for row in ROWS]
        expected = dllm.generate(LMS["tiny-llada"], prompts, "threshold", gen_length=8, block_length=4)
        assert [row["text"] for row in whole] == expected.texts
        assert [row["nfe"] for row in whole] == expected.nfe.tolist()

    def test_every_shard_is_named_by_its_first_row_and_the_folder_is_read_as_told(self) -> None:
        lines("q.jsonl", ROWS[:10])
        told = run().out
        assert names() == ["_manifest.json", *(f"rows-{first:012}.parquet" for first in (0, 4, 8))]
        assert told.splitlines()[0] == "10 of 10 rows are in out"
        code = re.search(r"pyarrow\.parquet\.(read_table\('out'\))", told)
        assert code is not None
        assert eval(code[1], {"read_table": parquet.read_table}).num_rows == 10

    @pytest.mark.parametrize("output", ["out/", "deep/er/out", "out.parquet"])
    def test_what_does_not_end_in_jsonl_is_a_folder(self, output: str) -> None:
        lines("q.jsonl", ROWS[:2])
        assert run(output=output).code == 0
        assert len(made(output)) == 2

    def test_a_folder_that_ends_in_jsonl_is_one_too_and_other_files_stay_answers(self) -> None:
        lines("q.jsonl", ROWS[:2])
        Path("a.jsonl").mkdir()
        assert run(output="a.jsonl").code == 0
        assert len(made("a.jsonl")) == 2
        Path("b.txt").touch()
        assert command("generate", "input=q.jsonl", "output=b.txt", "gen_length=8", "show=none").code == 0
        assert len(Path("b.txt").read_text().splitlines()) == 2

    def test_ids_that_are_numbers_are_a_column_of_numbers_and_mixed_ones_texts(self) -> None:
        for ids, expected in (([5, 3], [5, 3]), (["b", 3], ["b", "3"]), ([2**70, 1], [str(2**70), "1"])):
            lines("q.jsonl", [{"id": name, "prompt": "Tom"} for name in ids])
            assert run(output=f"out-{ids[0]}").code == 0
            assert [row["id"] for row in made(f"out-{ids[0]}")] == expected

    def test_without_ids_rows_are_numbered(self) -> None:
        lines("q.jsonl", [{"prompt": row["prompt"]} for row in ROWS[:6]])
        run()
        assert [row["id"] for row in made()] == list(range(6))

    def test_answers_have_the_form_that_is_asked_for_also_in_an_actor(self) -> None:
        asked = {"type": "regex", "regex": "(2|3)( pens)?"}
        options = dllm.Options(seed=0, gen_length=8, block_length=4, response_format=asked)
        setting = jobs.Setting(
            lambda: LMS["tiny-llada"],
            dllm.samplers.Threshold(),
            dllm.cache.NoCache(),
            pickle.loads(pickle.dumps(options)),
        )
        rows = [jobs.Row(number, number, row["prompt"]) for number, row in enumerate(ROWS[:5])]
        found = list(jobs.Decoder(setting, 2).decode(rows))
        assert len(found) == 5
        assert all(re.fullmatch("(2|3)( pens)?", row.text or "") for row in found)


class TestDeterminism:
    @pytest.mark.parametrize("arguments", [["batch_size=1"], ["batch_size=16"], ["cache=prefix", "batch_size=3"]])
    def test_batches_change_nothing(self, arguments: list[str], whole: list[dict[str, Any]]) -> None:
        lines("q.jsonl", ROWS)
        assert run(*arguments, size=7).code == 0
        if "cache=prefix" not in arguments:
            assert made() == whole
            return
        assert run("cache=prefix", "batch_size=8", output="other", size=23).code == 0
        assert made() == made("other")

    def test_samples_depend_on_id_and_seed_alone(self) -> None:
        hot = ("temperature=1", "seed=3")
        lines("q.jsonl", ROWS)
        lines("turned.jsonl", ROWS[::-1])
        assert run(*hot).code == 0
        assert run(*hot, "batch_size=3", source="turned.jsonl", output="turned", size=5).code == 0
        assert made("turned") == made()[::-1]
        assert run("temperature=1", "seed=4", output="other").code == 0
        assert [row["text"] for row in made("other")] != [row["text"] for row in made()]
        lines("same.jsonl", [{"id": n, "prompt": "Tom has"} for n in range(6)])
        assert run(*hot, source="same.jsonl", output="same").code == 0
        assert len({row["text"] for row in made("same")}) > 1

    def test_the_seed_of_a_row_is_documented(self) -> None:
        assert jobs.row_seed(0, 5) == jobs.row_seed(0, "5") != jobs.row_seed(5, 0)
        assert 0 <= jobs.row_seed(7, "x") < 2**62

    def test_any_seed_is_kept_for_the_rest_of_the_job(self) -> None:
        lines("q.jsonl", ROWS[:8])
        assert run("temperature=1", "seed=null").code == 0
        before = made()
        Path("out/rows-000000000004.parquet").unlink()
        assert run("temperature=1", "seed=null").code == 0
        assert made() == before


class TestFailures:
    ROWS = (
        {"id": "a", "prompt": "Tom"},
        {"id": "long", "prompt": "Tom " * 200},
        {"id": "none"},
        {"id": "both", "prompt": "Tom", "messages": [{"role": "user", "content": "Tom"}]},
        {"id": "odd", "prompt": 7},
        {"id": "torn", "prompt": "\ud800"},
        {"id": "b", "messages": [{"role": "user", "content": "Ann"}]},
    )

    def test_a_row_that_fails_is_written_with_its_error(self) -> None:
        lines("q.jsonl", list(self.ROWS))
        result = run()
        assert (result.code, result.err) == (0, "")
        assert "of which 5 failed (column error)" in result.out
        found = {row["id"]: row for row in made()}
        assert found["a"]["error"] is None is found["b"]["error"]
        for name, said in {
            "long": "prompt has ", "none": "no prompt", "both": "both prompt and messages", "odd": "7, and neither",
            "torn": "lone surrogate",
        }.items():  # fmt: skip
            assert said in found[name]["error"]
            assert (found[name]["text"], found[name]["tokens"], found[name]["nfe"]) == (None, 0, 0)
        assert run().out == result.out  # nothing is tried again

    def test_a_prompt_that_no_context_holds_fails_its_row_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dllm.jobs.rows._LETTERS", 100)
        chat = [{"role": "user", "content": "Tom " * 25}]
        lines("q.jsonl", [{"id": "a", "prompt": "Tom"}, {"prompt": "Tom " * 26}, {"messages": chat}])
        assert run().code == 0
        assert [row["error"] is None for row in made()] == [True, False, False]
        assert made()[1]["error"] == "the prompt has 104 letters, and no model's context holds more than 100"

    def test_logits_that_are_not_finite_fail_their_row_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spoilt = random_llada(tokenizer=True, max_length=96)
        assert spoilt.tokenizer is not None
        (token,) = set(spoilt.tokenizer("Mia").input_ids) - set(spoilt.tokenizer("Tom Ann").input_ids)
        with torch.no_grad():
            spoilt.backbone.get_input_embeddings().weight[token] = float("nan")
        monkeypatch.setattr(dllm, "load", lambda path, **_: spoilt)
        lines("q.jsonl", [{"prompt": "Tom"}, {"prompt": "Mia"}, {"prompt": "Ann"}])
        assert run().code == 0
        assert [row["error"] is None for row in made()] == [True, False, True]
        assert "not finite" in made()[1]["error"] or "NaN" in made()[1]["error"]
        assert made()[1]["text"] is None

    def test_too_many_failures_stop_the_job_and_a_larger_limit_resumes_it(self) -> None:
        lines("q.jsonl", [*self.ROWS, *ROWS])
        refused(
            run("engine.max_failures=2", size=2), "engine.max_failures=2 is exceeded: 3 of ", "rows failed; the last"
        )
        there = names()
        assert "rows-000000000002.parquet" in there  # complete before the first answer
        refused(run("engine.max_failures=0", size=2), "engine.max_failures=0 is exceeded")
        assert names() == there
        assert run("engine.max_failures=5", size=2).code == 0
        assert len(made()) == 30

    def test_no_answer_at_all_is_an_error(self) -> None:
        lines("q.jsonl", [{"id": n, "prompt": None, "messages": 7} for n in range(3)])
        refused(run(), "output='out': none of the 3 rows has an answer; the column error says why")
        assert len(made()) == 3

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("gen_length=2000", "gen_length=2000"),
            ("tempered_confidence=true", "tempered_confidence=true has no effect at temperature=0"),
            ("eos_token_id=100000", "eos_token_id=100000 is out of range"),
            ("gen_length=auto", "gen_length=auto needs a sampler that finds the length"),
        ],
    )
    def test_options_that_fit_no_row_are_refused(self, argument: str, said: str) -> None:
        lines("q.jsonl", ROWS[:3])
        refused(run(argument), said)
        assert not Path("out").exists()

    def test_masks_are_filled_and_a_row_without_them_fails(self) -> None:
        mask = LMS["tiny-llada"].tokenizer.mask_token
        lines("q.jsonl", [{"prompt": f"Tom {mask}{mask} pens"}, {"prompt": "Tom"}])
        plain = ("infill=true", "sampler=threshold", "show=none")
        assert command("generate", "input=q.jsonl", "output=out", *plain).code == 0
        filled, failed = made()
        assert (filled["tokens"], filled["error"]) == (2, None)
        assert "has no [MASK]" in failed["error"]


class TestResume:
    def interrupt(self, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
        """Let the disk be full after some shards."""
        left = iter(range(writes))
        write = job_folder.write_whole

        def torn(path: Path, content: bytes) -> None:
            if next(left, None) is None:
                (path.parent / f".dllm-{'0' * 16}").write_bytes(content[: len(content) // 2])
                raise OSError(28, "No space left on device", str(path))
            write(path, content)

        monkeypatch.setattr(job_folder, "write_whole", torn)

    @pytest.mark.parametrize("writes", [0, 1, 3])
    def test_a_job_continues_after_the_shards_that_are_there(
        self, writes: int, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines("q.jsonl", ROWS)
        with monkeypatch.context() as patched:
            self.interrupt(patched, writes)
            refused(run(), "output='out' cannot be used (No space left on device); free disk space")
        kept = {name: Path("out", name).stat().st_ino for name in names() if name.startswith("rows-")}
        assert len(kept) == writes
        assert Path("out", f".dllm-{'0' * 16}").exists()
        assert run("batch_size=2").code == 0
        assert made() == whole
        assert not [name for name in names() if name.startswith(".")]
        assert kept.items() <= {name: Path("out", name).stat().st_ino for name in names()}.items()

    def test_a_finished_job_loads_no_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines("q.jsonl", ROWS[:3])
        before = run()
        monkeypatch.setattr(dllm, "load", None)
        assert run() == before

    def test_only_missing_shards_are_decoded(
        self, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines("q.jsonl", ROWS)
        run()
        for first in (4, 20):
            Path(f"out/rows-{first:012}.parquet").unlink()
        decoded: list[int] = []
        decode = jobs.Decoder.decode

        def watched(self: jobs.Decoder, rows: Any) -> Iterator[jobs.Result]:
            for result in decode(self, rows):
                decoded.append(result.number)
                yield result

        monkeypatch.setattr(jobs.Decoder, "decode", watched)
        assert run().code == 0
        assert sorted(decoded) == [4, 5, 6, 7, 20, 21, 22]
        assert made() == whole

    @pytest.mark.parametrize(
        ("arguments", "before", "now"),
        [
            (["gen_length=4"], "gen_length=8", "gen_length=4"),
            (["sampler=vanilla"], "sampler=threshold", "sampler=vanilla"),
            (["cache=prefix"], "cache=none", "cache=prefix"),
            (["seed=1"], "seed=0", "seed=1"),
            (["chat=true"], "chat=false", "chat=true"),
            ([], "engine.shard_rows=4", "engine.shard_rows=5"),
            (["model=tiny-dream"], "model=tiny-llada", "model=tiny-dream"),
        ],
    )
    @pytest.mark.parametrize("finished", [True, False])
    def test_other_options_are_refused(self, arguments: list[str], before: str, now: str, finished: bool) -> None:
        lines("q.jsonl", ROWS[:8])
        run()
        if not finished:
            Path("out/rows-000000000004.parquet").unlink()
        there = names()
        refused(
            run(*arguments, size=4 if arguments else 5),
            f"output='out' was made with {before}; this run has {now}: give another output",
        )
        assert names() == there

    def test_another_format_is_refused(self) -> None:
        lines("q.jsonl", ROWS[:2])
        asked = ['{"type": "json_schema", "schema": {}}', '{"type": "json_schema", "schema": {"const": null}}']
        assert run(f"response_format={asked[0]}").code == 0
        assert run(f"response_format={asked[0]}").code == 0
        told = f"made with response_format={asked[0]}; this run has response_format={asked[1]}: give another output"
        refused(run(f"response_format={asked[1]}"), told)

    def test_another_input_is_refused(self) -> None:
        lines("q.jsonl", ROWS[:8])
        run()
        for other in (ROWS[:9], [*ROWS[:7], {"id": "r7", "prompt": "Tom"}], [ROWS[1], ROWS[0], *ROWS[2:8]]):
            lines("q.jsonl", other)
            refused(run(), f"output='out' is the job of another input, of 8 rows; this one has {len(other)}")

    def test_the_same_rows_in_other_files_are_the_same_job(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines("q.jsonl", ROWS[:8])
        before = run()
        lines("two/1.jsonl", ROWS[:3])
        parquet.write_table(pa.Table.from_pylist(ROWS[3:8]), "two/2.parquet")
        monkeypatch.setattr(dllm, "load", None)
        assert run(source="two") == before

    def test_a_filter_that_is_replaced_before_decoding_begins_stops_the_job(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines("q.jsonl", ROWS[:3])
        shutil.copy(dllm.files.BUNDLED / "tiny-llada" / "learn2pd.safetensors", "filter.safetensors")
        scan = jobs.Input.scan

        def replaced(source: jobs.Input, size: int) -> Any:
            torch_filter = load_file("filter.safetensors")
            save_file({name: each + 1 for name, each in torch_filter.items()}, "other.safetensors")
            Path("other.safetensors").replace("filter.safetensors")
            return scan(source, size)

        monkeypatch.setattr(jobs.Input, "scan", replaced)
        result = run("sampler=learn2pd", "sampler.filter=filter.safetensors", "sampler.allow_mismatch=true")
        refused(result, "filter.safetensors was changed by another program during this run")
        assert not list(Path("out").glob("*.parquet"))

    def test_files_that_are_not_where_a_worker_runs_were_read_already(self) -> None:
        shutil.copy(dllm.files.BUNDLED / "tiny-llada" / "learn2pd.safetensors", "filter.safetensors")
        sampler = Learn2PD(filter="filter.safetensors")
        files = identity.read_by(sampler)
        identity.check_read(files, sampler)
        Path("filter.safetensors").rename("moved")
        identity.check_read(files, sampler)
        Path("filter.safetensors").write_bytes(b"other")
        with pytest.raises(OSError, match=r"filter\.safetensors was changed"):
            identity.check_read(files, sampler)

    def test_an_input_that_changes_meanwhile_stops_the_job(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines("q.jsonl", ROWS)
        scan = jobs.Input.scan

        def changed(self: jobs.Input, size: int) -> jobs.Summary:
            summary = scan(self, size)
            lines("q.jsonl", [*ROWS[:9], {"id": "r9", "prompt": "Mia"}, *ROWS[10:]])
            return summary

        with monkeypatch.context() as patched:
            patched.setattr(jobs.Input, "scan", changed)
            refused(run("batch_size=1"), "input='q.jsonl' was changed by another program during this run")
        lines("q.jsonl", ROWS)
        assert run().code == 0
        assert [row["id"] for row in made()] == [row["id"] for row in ROWS]


class TestFolder:
    def test_a_second_job_says_who_holds_the_folder(self) -> None:
        lines("q.jsonl", ROWS[:3])
        with jobs.JobFolder("out"):
            refused(run(), "output='out' is being written by process ", "; wait for it to end, or give another output")
        assert run().code == 0

    def test_foreign_files_are_refused_and_kept(self) -> None:
        lines("q.jsonl", ROWS[:3])
        lines("out/notes.txt", ["mine"])
        refused(run(), "output='out' holds notes.txt, which is no shard of a job; give another output")
        assert names() == ["notes.txt"]

    def test_a_refused_folder_keeps_what_another_process_is_writing(self) -> None:
        lines("q.jsonl", ROWS)
        lines("out/.dllm-0123456789abcdef", [])
        lines("out/results.json", [])
        refused(run(), "holds results.json, which is no shard of a job")
        assert names() == [".dllm-0123456789abcdef", "results.json"]

    def test_shards_of_another_job_are_refused(self) -> None:
        lines("q.jsonl", ROWS[:8])
        run()
        run("seed=1", output="other")
        shutil.copy("other/rows-000000000004.parquet", "out")
        refused(run(), "output='out': rows-000000000004.parquet is no shard of this job; move it elsewhere")
        Path("out/rows-000000000004.parquet").write_bytes(Path("out/rows-000000000000.parquet").read_bytes()[:-9])
        refused(run(), "output='out': rows-000000000004.parquet cannot be read (", "; remove it, then the same command")
        Path("out/_manifest.json").unlink()
        refused(run(), "output='out' has shards without a _manifest.json")

    def test_a_shard_whose_answers_were_changed_is_refused(self) -> None:
        lines("q.jsonl", ROWS[:8])
        assert run().code == 0
        shard = Path("out/rows-000000000004.parquet")
        content, table = shard.read_bytes(), parquet.read_table(shard, partitioning=None)
        text = parquet.ParquetFile(shard).metadata.row_group(0).column(1)
        start = text.dictionary_page_offset or text.data_page_offset
        other = table.set_column(1, "text", pa.array(["another"] * len(table)))
        for changed in (other, table.drop_columns(["text"]), table):
            parquet.write_table(changed, shard)
            refused(run(), "output='out': rows-000000000004.parquet was written by another program, or by an earlier")
        shard.write_bytes(
            content[: start + 30]
            + bytes(each ^ 255 for each in content[start + 30 : start + 40])
            + content[start + 40 :]
        )
        refused(run(), "output='out': rows-000000000004.parquet was changed since this job wrote it; remove it")
        parquet.write_table(table.drop_columns(["id"]), shard)
        refused(run(), "output='out': rows-000000000004.parquet cannot be read (no column id); remove it")
        shard.unlink()
        assert run().code == 0
        assert shard.read_bytes() == content

    @pytest.mark.parametrize("whole", [True, False])
    @pytest.mark.parametrize("first", [4, 2, 12])
    def test_a_shard_with_the_rows_of_another_is_refused(self, first: int, whole: bool) -> None:
        rows = [{"id": n if whole else f"r{n}", "prompt": row["prompt"]} for n, row in enumerate(ROWS[:8])]
        lines("q.jsonl", rows)
        run()
        Path("out/rows-000000000004.parquet").unlink()
        shutil.copy("out/rows-000000000000.parquet", f"out/rows-{first:012}.parquet")
        refused(
            run(),
            f"output='out': rows-{first:012}.parquet has other rows than its name says; move it elsewhere, then run "
            "the command again",
        )
        Path(f"out/rows-{first:012}.parquet").unlink()
        assert run().code == 0
        assert [row["id"] for row in made()] == [row["id"] for row in rows]

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("{", "is not JSON"), ("[]", "not an object"), ("{}", "is not a manifest of a job"),
            ('{"format": "dllm-job", "version": 1, "rows": "x"}', "is damaged ("),
        ],
    )  # fmt: skip
    def test_a_damaged_manifest_is_refused(self, content: str, said: str) -> None:
        lines("q.jsonl", ROWS[:3])
        run()
        Path("out/_manifest.json").write_text(content)
        refused(run(), "out/_manifest.json", said)

    @pytest.mark.parametrize("content", ["mine", "[]", '{"mine": 1}', '{"format": "other", "version": 1}'])
    def test_a_manifest_of_another_program_is_kept(self, content: str) -> None:
        lines("q.jsonl", ROWS[:3])
        Path("out").mkdir()
        Path("out/_manifest.json").write_text(content)
        refused(run(), "out/_manifest.json", "give another output")
        assert Path("out/_manifest.json").read_text() == content

    def test_the_manifest_of_a_job_without_shards_is_written_again(self) -> None:
        lines("q.jsonl", ROWS[:3])
        assert run("seed=1").code == 0
        Path("out/rows-000000000000.parquet").unlink()
        assert run("seed=2").code == 0
        assert json.loads(Path("out/_manifest.json").read_text())["options"]["seed"] == 2

    def test_a_shard_removed_during_the_run_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines("q.jsonl", ROWS[:8])
        write = jobs.JobFolder.write

        def removing(self: jobs.JobFolder, results: Any) -> None:
            write(self, results)
            Path("out/rows-000000000000.parquet").unlink(missing_ok=True)

        monkeypatch.setattr(jobs.JobFolder, "write", removing)
        refused(run(), "output='out': rows-000000000000.parquet was removed by another program during this run")

    def test_a_shard_cut_during_the_run_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines("q.jsonl", ROWS[:8])
        write = jobs.JobFolder.write

        def cutting(self: jobs.JobFolder, results: Any) -> None:
            write(self, results)
            Path("out/rows-000000000000.parquet").write_bytes(b"")

        with monkeypatch.context() as patched:
            patched.setattr(jobs.JobFolder, "write", cutting)
            refused(
                run(),
                "output='out': rows-000000000000.parquet was changed by another program during this run; remove it, "
                "then run the command again",
            )
        Path("out/rows-000000000000.parquet").unlink()
        assert run().code == 0
        assert [row["id"] for row in made()] == [row["id"] for row in ROWS[:8]]

    def begun(self, finished: bool) -> None:
        """A job of two shards, of which the second may be missing."""
        lines("q.jsonl", ROWS[:8])
        run()
        if not finished:
            Path("out/rows-000000000004.parquet").unlink()

    def once_open(self, act: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
        """Do something after the next run has read the folder."""
        open_folder = jobs.JobFolder.open

        def acting(folder: jobs.JobFolder, *given: Any) -> None:
            open_folder(folder, *given)
            act()

        patch.setattr(jobs.JobFolder, "open", acting)

    @pytest.mark.parametrize("finished", [True, False])
    @pytest.mark.parametrize("edit", [lambda _: b"", lambda data: data[:10] + bytes([data[10] ^ 255]) + data[11:]])
    def test_a_shard_of_an_earlier_run_changed_during_this_one_is_told(
        self, finished: bool, edit: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.begun(finished)
        path = Path("out/rows-000000000000.parquet")
        self.once_open(lambda: path.write_bytes(edit(path.read_bytes())), monkeypatch)
        refused(run(), "output='out': rows-000000000000.parquet was changed by another program during this run")

    @pytest.mark.parametrize("content", [None, "{}"])
    @pytest.mark.parametrize("first", [0, 4, 8])
    def test_a_manifest_lost_during_the_run_is_written_again(
        self, content: str | None, first: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines("q.jsonl", ROWS[:12])
        write, file = jobs.JobFolder.write, Path("out/_manifest.json")
        before: list[bytes] = []

        def losing(self: jobs.JobFolder, results: Any) -> None:
            write(self, results)
            before.append(file.read_bytes())
            if results[0].number == first:
                file.unlink() if content is None else file.write_text(content)

        with monkeypatch.context() as patched:
            patched.setattr(jobs.JobFolder, "write", losing)
            what = "removed" if content is None else "changed"
            refused(
                run(),
                f"out/_manifest.json was {what} by another program during this run; it is written again, and all rows "
                "are kept",
            )
        assert {*before, file.read_bytes()} == {before[0]}  # with the next shard, if there is one
        monkeypatch.setattr(dllm, "load", None)
        assert run().code == 0
        assert len(made()) == 12

    @pytest.mark.parametrize("finished", [True, False])
    def test_a_manifest_of_an_earlier_run_lost_during_this_one_is_written_again(
        self, finished: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.begun(finished)
        with monkeypatch.context() as patched:
            self.once_open(Path("out/_manifest.json").unlink, patched)
            refused(run(), "out/_manifest.json was removed by another program during this run; it is written again")
        assert run().code == 0

    def test_a_manifest_lost_before_an_error_is_written_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines("q.jsonl", [*ROWS[:4], {"id": "none"}])
        write = jobs.JobFolder.write

        def losing(self: jobs.JobFolder, results: Any) -> None:
            write(self, results)
            Path("out/_manifest.json").unlink()

        with monkeypatch.context() as patched:
            patched.setattr(jobs.JobFolder, "write", losing)
            refused(run("engine.max_failures=0", "batch_size=1"), "engine.max_failures=0 is exceeded")
        assert names() == ["_manifest.json", "rows-000000000004.parquet"]
        assert run().code == 0

    def test_a_job_that_does_not_begin_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines("q.jsonl", [{"id": 1}])
        refused(run(output="deep/out"), "has no column prompt or messages")
        assert not Path("deep").exists()

    def test_a_folder_that_cannot_be_is_refused(self) -> None:
        lines("q.jsonl", ROWS[:3])
        Path("file").touch()
        refused(run(output="file/"), "output='file/' is not a folder; give another output")
        refused(run(output="q.jsonl/out"), "output='q.jsonl/out' cannot be created (Not a directory)")
        Path("loop").symlink_to("nowhere")
        refused(run(output="loop/"), "output='loop/' is not a folder")

    def test_the_lock_is_that_of_other_commands(self) -> None:
        Path("out").mkdir()
        lock = Claim(Path("out/_manifest.json").absolute(), "", "")
        lock.take()
        lines("q.jsonl", ROWS[:1])
        refused(run(), "is being written by process ")
        lock.release()


class TestInput:
    def test_files_folders_and_data_sets_are_alike(self, whole: list[dict[str, Any]]) -> None:
        table = pa.Table.from_pylist(ROWS)
        parquet.write_table(table, "q.parquet")
        lines("many/a.jsonl", ROWS[:5])
        parquet.write_table(table.slice(5, 7), "many/b.parquet", row_group_size=3)
        lines("elsewhere/d.jsonl", ROWS[12:20])
        Path("many/c").symlink_to("../elsewhere")
        Path("many/c/circle").symlink_to("../many")
        for name in ("_latest", "a-latest"):  # which changes neither rows nor order
            Path("many", name).symlink_to("e")
        lines("many/e/f.jsonl", ROWS[20:])
        lines("many/_log.jsonl", ["not data"])
        data = datasets.Dataset(table)
        data.save_to_disk("saved")
        datasets.DatasetDict({"test": data, "train": data.select([0])}).save_to_disk("splits")
        for source, more in (("q.parquet", ()), ("many", ()), ("saved", ()), ("splits", ("split=test",))):
            assert run(*more, source=source, output=f"out-{source}").code == 0
            assert made(f"out-{source}") == whole
        assert run(source="splits", output="train").code == 0
        assert made("train") == whole[:1]

    def test_chats_in_tables_are_those_of_lines(self) -> None:
        chats = [
            [{"role": "user", "content": "Tom"}],
            [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Ann"}],
        ]
        lines("q.jsonl", [{"id": n, "messages": chat} for n, chat in enumerate(chats)])
        parquet.write_table(
            pa.Table.from_pylist([{"messages": [m | {"name": None} for m in c]} for c in chats]), "q.parquet"
        )
        assert run().code == run(source="q.parquet", output="table").code == 0
        assert made() == made("table")
        lines("texts.jsonl", [{"id": n, "prompt": "Ann"} for n in range(2)])
        lines("asked.jsonl", [{"id": n, "messages": [{"role": "user", "content": "Ann"}]} for n in range(2)])
        run("chat=true", source="texts.jsonl", output="x")
        run(source="asked.jsonl", output="y")
        assert made("x") == made("y")

    @pytest.mark.parametrize(
        "more", [{"sent": date(2026, 1, 2)}, {"sent": datetime(2026, 1, 2)}, {"cost": Decimal("0.5")}]
    )
    def test_messages_may_carry_times_and_decimals_beside_their_text(self, more: dict[str, Any]) -> None:
        chat = {"role": "user", "content": "Ann"}
        parquet.write_table(pa.table({"messages": [[chat], [chat | more]]}), "q.parquet")
        assert run(source="q.parquet").code == 0
        plain, other = made()
        assert (other["text"], other["error"]) == (plain["text"], None)

    def test_a_message_that_is_binary_fails_its_row(self) -> None:
        chats = [[{"role": "user", "content": b"Ann"}], None]
        table = pa.table({"messages": pa.array(chats), "prompt": [None, "Tom"]})
        parquet.write_table(table, "q.parquet")
        assert run(source="q.parquet").code == 0
        failed, fine = made()
        assert (failed["text"], fine["error"]) == (None, None)
        said = "and neither text nor messages (JSON has no bytes)"
        assert failed["error"] == f"the prompt is {chats[0]!r}, {said}"

    def test_a_prompt_that_is_binary_fails_its_row(self) -> None:
        parquet.write_table(pa.table({"prompt": [b"Tom", b"Ann"]}), "q.parquet")
        refused(run(source="q.parquet"), "none of the 2 rows has an answer")
        assert made()[0]["error"].startswith("the prompt is b'Tom', and neither text nor messages")

    def test_the_column_of_prompts_can_be_named(self) -> None:
        rows = [{"id": n, "question": row["prompt"], "prompt": "other"} for n, row in enumerate(ROWS[:5])]
        lines("q.jsonl", rows)
        parquet.write_table(pa.Table.from_pylist(rows), "q.parquet")
        lines("plain.jsonl", [{"id": n, "prompt": row["prompt"]} for n, row in enumerate(ROWS[:5])])
        assert run(source="plain.jsonl", output="plain").code == 0
        for source in ("q.jsonl", "q.parquet"):
            assert run("column=question", source=source, output=f"out-{source}/").code == 0
            assert made(f"out-{source}/") == made("plain")

    def test_other_files_of_a_folder_are_told(self) -> None:
        lines("many/a.jsonl", ROWS[:2])
        lines("many/b.csv", ["x"])
        assert run(source="many").err == "input='many': not read, since neither .jsonl nor .parquet: b.csv\n"

    def test_a_column_that_is_there_twice_is_refused(self) -> None:
        parquet.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), "q.parquet")
        refused(run(source="q.parquet"), "has several columns prompt; keep one of them")

    def test_bad_input_is_one_line(self) -> None:
        lines("good.jsonl", ROWS[:2])
        lines("double.jsonl", [*ROWS[:2], ROWS[0]])
        lines("number.jsonl", [{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}])
        lines("given.jsonl", [{"id": 1, "prompt": "a"}, {"prompt": "b"}])
        lines("real.jsonl", [{"id": 1.5, "prompt": "a"}])
        lines("asked.jsonl", [{"question": "a", "answer": "b"}])
        lines("list.jsonl", [["a"]])
        lines("twice/a.jsonl", ROWS[:2])
        lines("twice/b.jsonl", ROWS[1:3])
        lines("damaged/a.jsonl", ROWS[:2])
        Path("damaged/b.parquet").write_bytes(b"PAR1 and no more")
        lines("schema/a.jsonl", ROWS[:2])
        parquet.write_table(pa.table({"text": ["a"], "label": [1]}), "schema/b.parquet")
        Path("torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b')
        Path("latin.jsonl").write_bytes(b'{"prompt": "\xe4"}\n')
        Path("none.jsonl").touch()
        Path("empty").mkdir()
        lines("gone/a.jsonl", ROWS[:2])
        Path("gone/b.jsonl").symlink_to("/nowhere/b.jsonl")
        lines("pipe/a.jsonl", ROWS[:2])
        os.mkfifo("pipe/b.jsonl")
        datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk("splits")
        for name, file in (("saved", "dataset_info.json"), ("saved", "state.json"), ("unsplit", "dataset_dict.json")):
            Path(name).mkdir(exist_ok=True)
            (Path(name) / file).write_text("[]")
        for source, said in {
            "missing.jsonl": "cannot be read (No such file or directory)", "/no/such/folder": "cannot be read",
            "double.jsonl": "line 3: id 'r0' occurs twice; make ids unique", "number.jsonl": "id '1' occurs twice",
            "given.jsonl": "id '1' occurs twice", "real.jsonl": "line 1 has id 1.5; use text or a whole number",
            "asked.jsonl": "has no column prompt or messages; give column=NAME, one of question, answer",
            "list.jsonl": "line 1 is a JSON list, not an object", "twice": ": b.jsonl line 1: id 'r1' occurs twice",
            "gone": "input='gone': b.jsonl is a link to nothing; repair or remove it",
            "pipe": "input='pipe': b.jsonl is no file; repair or remove it",
            "damaged": "input='damaged': b.parquet cannot be read (",
            "schema": "b.parquet has no column prompt or messages; give column=NAME, one of text, label",
            "torn.jsonl": "line 2 is not JSON", "latin.jsonl": "line 1 is not JSON", "none.jsonl": "has no rows",
            "empty": "has no .jsonl or .parquet files", "saved": "cannot be read (", "unsplit": "cannot be read (",
            "splits": "cannot be read (it has no split 'train'; use split=",
        }.items():  # fmt: skip
            refused(run(source=source), f"input='{source}'", said)
        refused(
            run("column=question", source="good.jsonl"), "has no column question; give column=NAME, one of id, prompt"
        )
        refused(run("split=test", source="good.jsonl"), "split='test' has no effect on files; leave it out")
        assert not Path("out").exists()

    def test_a_parquet_file_that_unpacks_to_very_much_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dllm.jobs.rows._UNPACKED", 1 << 20)
        table = pa.table({"prompt": ["a" * (1 << 20)], "label": [1]})
        parquet.write_table(table, "packed.parquet", compression="zstd", write_statistics=False)
        refused(run(source="packed.parquet"), "input='packed.parquet' cannot be read (it unpacks ")
        parquet.write_table(table, "packed.parquet", compression="none")
        list(jobs.Input("packed.parquet").shards(4))

    def test_a_folder_that_cannot_be_listed_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines("many/a.jsonl", ROWS[:2])
        lines("many/closed/b.jsonl", ROWS[2:])
        listed = os.scandir

        def denied(path: Any) -> Any:
            if str(path).endswith("closed"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return listed(path)

        monkeypatch.setattr(os, "scandir", denied)
        refused(run(source="many"), "input='many' cannot be read", "many/closed")

    def test_input_and_output_that_hold_each_other_are_refused(self) -> None:
        lines("q/a.jsonl", ROWS[:2])
        refused(run(source="q", output="q/out"), "output='q/out' is within input='q'; give a folder outside it")
        refused(run(source="q", output="q"), "output='q' is ")
        refused(
            run(source="q", output="a.jsonl"),
            "input='q' cannot be read as a JSONL file; give a folder as output, for a job",
        )


class TestOptions:
    @pytest.mark.parametrize("name", ["local", "ray"])
    def test_yaml_mirrors_the_constructor(self, name: str) -> None:
        written = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "engine" / f"{name}.yaml"))
        made_by = {"dllm.jobs.Local": jobs.Local, "dllm.jobs.Ray": jobs.Ray}[written.pop("_target_")]
        parameters = inspect.signature(made_by).parameters
        assert written == {key: parameter.default for key, parameter in parameters.items()}

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("engine.shard_rows=0", "engine.shard_rows=0 is out of range"),
            ("engine.max_failures=-1", "engine.max_failures=-1 is out of range"),
            ("engine.actors=2", "unknown option 'engine.actors'"),
            ("engine=other", "unknown engine=other; expected one of local, ray"),
            ("resume=mixed", "resume=mixed has no effect on a job"),
            ("cache=prefix cache.measure_every=2", "cache.measure_every=2 has no effect on a job"),
            ("output=a.jsonl column=x", "column=x has no effect without a job"),
            ("output=a.jsonl ++column=x", "column=x has no effect without a job"),
            ("output=a.jsonl engine=local", "engine=local has no effect without a job"),
            ("picture=a.svg", "picture and input are mutually exclusive"),
        ],
    )
    def test_bad_options_are_one_line(self, argument: str, said: str) -> None:
        lines("q.jsonl", ROWS[:2])
        given = {"input": "q.jsonl", "output": "out"} | dict(each.split("=", 1) for each in argument.split())
        refused(command("generate", *(f"{name}={value}" for name, value in given.items())), said)
        assert not Path("out").exists()

    def test_help_lists_the_engines(self) -> None:
        told = command("generate", "--help").out
        assert "engine=NAME, by default local:" in told
        assert "engine.NAME=VALUE" in told


@in_a_process
def test_a_job_survives_kills_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output, whole = (tmp_path / name for name in ("asked.jsonl", "out", "whole"))
    kills.write_rows(source)
    monkeypatch.undo()  # with the real model
    assert command("generate", *kills.arguments(source, whole)).code == 0
    chance = random.Random(0)
    for _ in range(kills.KILLS):
        kills.kill_process(start("generate", *kills.arguments(source, output)), output, chance)
    assert kills.shards(output) < kills.ROWS / 4
    assert start("generate", *kills.arguments(source, output)).wait(300) == 0
    assert kills.contents(output) == kills.contents(whole)
    assert not list(output.glob(".*"))
