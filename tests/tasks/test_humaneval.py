"""HumanEval through the harness: the harness's own prompts and stops, graded in the sandbox, or not at all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from dllm.tasks import humaneval, rows, sandbox

MEMORY = 1 << 30


def row(name: str, body: str, value: int) -> dict[str, str]:
    return {
        "task_id": f"Test/{name}",
        "prompt": f'from typing import List\n\n\ndef {name}(x: int) -> int:\n    """Do {name}."""\n',
        "canonical_solution": body,
        "test": f"\n\ndef check(candidate):\n    assert candidate(3) == {value}\n\n",
        "entry_point": name,
    }


ROWS = [
    row("double", "    return 2 * x\n", 6),
    row("square", "    return x * x\n", 9),
    row("next", "    return x + 1\n", 4),
]
WRONG = ["    return 0\n", "    while True: pass\n", "    exit()\n", "    return (\n", "    raise SystemExit\n"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return str(path)


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Evaluates a task with a model that answers by table, and returns the harness's results."""
    lm_eval = pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(offline, "1")

    class Table(LM):  # type: ignore[misc]  # the harness is not typed
        def __init__(self, answers: dict[str, str]) -> None:
            super().__init__()
            self.answers = answers

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [self.answers[request.doc["entry_point"]] for request in requests]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

    def run(config: dict[str, Any], answers: dict[str, str]) -> Any:
        manager = TaskManager(include_defaults=False)
        return lm_eval.simple_evaluate(Table(answers), tasks=[config], task_manager=manager, bootstrap_iters=0)

    return run


class TestHarness:
    def test_answers_are_graded_by_their_tests(self, evaluate: Callable[..., Any], data: str) -> None:
        config = humaneval.task(data, execute=True, timeout=0.5)
        answers = {
            "double": ROWS[0]["canonical_solution"],
            "square": "    return x\n",
            "next": "    while True: pass\n",
        }
        out = evaluate(config, answers)
        assert out["results"]["humaneval"]["pass@1,create_test"] == pytest.approx(1 / 3)
        assert out["n-samples"]["humaneval"] == {"original": 3, "effective": 3}
        samples = out["samples"]["humaneval"]
        assert [sample["pass@1"] for sample in samples] == [1.0, 0.0, 0.0]
        for sample, source in zip(samples, ROWS, strict=True):
            assert sample["filtered_resps"] == [[source["prompt"] + answers[source["entry_point"]]]]
            prompt, options = sample["arguments"][0]
            assert prompt == source["prompt"]
            assert options == {"until": list(humaneval.STOPS), "max_gen_toks": 1024, "do_sample": False}
        assert json.loads(json.dumps(out["configs"]))["humaneval"]["process_results"]["timeout"] == 0.5

    def test_nothing_is_run_where_nothing_may_be(
        self, evaluate: Callable[..., Any], data: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sandbox, "execute", lambda *args: pytest.fail("was run"))
        out = evaluate(humaneval.task(data, execute=False), {row["entry_point"]: "    return 1\n" for row in ROWS})
        result = out["results"]["humaneval"]
        assert result["generated,create_test"] == 1.0
        assert not [name for name in result if "pass" in name]
        assert out["n-samples"]["humaneval"]["effective"] == 3
        assert all("pass@1" not in sample for sample in out["samples"]["humaneval"])

    def test_answers_of_chats_end_where_their_code_does(self, evaluate: Callable[..., Any], data: str) -> None:
        config = humaneval.task(data, execute=True, instruct=True)
        answers = {row["entry_point"]: row["canonical_solution"] for row in ROWS}
        answers["double"] += "```\nThis doubles `x`."
        answers["next"] = "```" + answers["next"]
        out = evaluate(config, answers)
        samples = out["samples"]["humaneval_instruct"]
        assert [sample["pass@1"] for sample in samples] == [1.0, 1.0, 0.0]
        prompt = samples[0]["arguments"][0][0]
        assert prompt.startswith("Write a solution to the following problem")
        assert prompt.count(ROWS[0]["prompt"]) == 2
        assert samples[0]["filtered_resps"] == [[ROWS[0]["prompt"] + ROWS[0]["canonical_solution"]]]

    @pytest.mark.parametrize("instruct", [False, True])
    def test_prompts_and_stops_are_the_harness_own(self, data: str, instruct: bool) -> None:
        lm_eval, yaml = pytest.importorskip("lm_eval"), pytest.importorskip("yaml")

        class Loader(yaml.SafeLoader):  # type: ignore[misc]  # imported only where it is there
            pass

        Loader.add_constructor("!function", lambda loader, node: node.value)
        folder, own = Path(lm_eval.__file__).parent / "tasks" / "humaneval", {}
        for name in ("humaneval", "humaneval_instruct")[: 1 + instruct]:
            own |= yaml.load((folder / f"{name}.yaml").read_text(), Loader)  # a safe loader
        for described in (humaneval.task(data, True, instruct=instruct), humaneval.task(None, True, instruct=instruct)):
            ours = dict(described)
            theirs = {name: value for name, value in own.items() if name not in ("include", "unsafe_code")}
            assert set(theirs) <= set(ours)
            for name in ("metric_list", "filter_list"):
                assert len(ours.pop(name)) == len(theirs.pop(name)) == 1
            if ours.pop("dataset_path") == "json":
                assert ours.pop("dataset_kwargs") == {"data_files": {"test": data}}
            else:
                assert theirs["dataset_path"] == humaneval.HUB
            del theirs["dataset_path"], ours["process_results"]
            assert ours == theirs


class TestPrograms:
    def test_the_tests_decide(self) -> None:
        for problem in ROWS:
            assert sandbox.execute(humaneval.program(problem, problem["canonical_solution"])).passed
            for wrong in WRONG:
                assert not sandbox.execute(humaneval.program(problem, wrong), timeout=0.5).passed

    def test_published_solutions_pass_and_others_do_not(self, shared: Path) -> None:
        path = shared / "data" / "HumanEval.jsonl.gz"
        if not path.is_file():
            pytest.skip(f"needs {path}")
        problems = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        assert humaneval.task(str(path), execute=True)["test_split"] == "test"
        for problem in problems[::40]:
            outcome = sandbox.execute(humaneval.program(problem, problem["canonical_solution"]))
            assert outcome.passed, (problem["task_id"], outcome)
            assert not sandbox.execute(humaneval.program(problem, "    return None\n")).passed
            assert not sandbox.execute(humaneval.program(problem, "    exit(0)\n")).passed


class TestErrors:
    def refused(self, path: Path, content: bytes | None = None) -> str:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^task\.data=") as caught:
            humaneval.task(str(path), execute=False)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        assert "cannot be read" in self.refused(tmp_path / "missing.jsonl")
        assert "cannot be read" in self.refused(tmp_path)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "has no lines"),
            (b"\n\n", "has no lines"),
            (json.dumps(ROWS[0]).encode() + b"\n{", "line 2 is not JSON"),
            (b"[1]", "line 1 has no text 'task_id'"),
            (json.dumps(ROWS[0] | {"test": None}).encode(), "line 1 has no text 'test'"),
            (b'{"prompt": "\xff"}', "cannot be read"),
            (gzip.compress(b"x" * 10_000, mtime=0)[:-20], "cannot be read"),
        ],
    )
    def test_a_file_of_something_else(self, tmp_path: Path, content: bytes, words: str) -> None:
        assert words in self.refused(tmp_path / "rows.jsonl", content)

    def test_a_file_that_unpacks_to_very_much(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rows, "_MOST_UNPACKED", 10_000)
        assert "unpacks to more than 10000 bytes" in self.refused(tmp_path / "rows.jsonl", gzip.compress(b" " * 10_001))
        content = json.dumps(ROWS[0]).encode()
        (tmp_path / "rows.jsonl").write_bytes(gzip.compress(content + b" " * (10_000 - len(content))))
        humaneval.task(str(tmp_path / "rows.jsonl"), execute=False)

    @pytest.mark.parametrize("name", ["h[1].jsonl", "h*.jsonl", "[!a]", "d[1]/h?.jsonl"])
    def test_the_file_of_that_name_is_read(self, name: str, tmp_path: Path) -> None:
        for number, other in enumerate([name, "h1.jsonl", "hh.jsonl", "x", "d1/h1.jsonl"]):
            (tmp_path / other).parent.mkdir(exist_ok=True)
            (tmp_path / other).write_text(json.dumps(ROWS[0] | {"task_id": str(number)}) + "\n")
        config = humaneval.task(str(tmp_path / name), execute=False)
        found = datasets.load_dataset("json", **config["dataset_kwargs"], cache_dir=str(tmp_path / "cache"))
        assert found["test"]["task_id"][:] == ["0"]

    def test_an_archive_within_a_name(self, tmp_path: Path) -> None:
        assert "rename it" in self.refused(tmp_path / "a::b.jsonl", json.dumps(ROWS[0]).encode())

    def test_limits_are_checked_before_anything_is_generated(self, data: str) -> None:
        with pytest.raises(ValueError, match="timeout=0 is out of range"):
            humaneval.task(data, execute=True, timeout=0)
        with pytest.raises(ValueError, match="memory=5 is out of range"):
            humaneval.task(data, execute=True, memory=5)
