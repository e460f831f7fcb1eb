"""Jobs on Ray: the same rows as in one process, however many actors there are and whichever of them die."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import dllm
import kills
from commands import command, start
from dllm import jobs
from dllm.decoding.options import Options
from dllm.jobs import engines
from models import random_llada

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")
LM = random_llada(tokenizer=True, max_length=64)


def setting(**options: Any) -> jobs.Setting:
    sampler, cache = dllm.samplers.Threshold(), dllm.cache.NoCache()
    return jobs.Setting(lambda: LM, sampler, cache, Options(**{"seed": 0, "gen_length": 8, **options}))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the whole module."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / "q.jsonl"
    kills.write_rows(path)
    return path


@pytest.fixture(scope="module")
def whole(source: Path) -> list[dict[str, Any]]:
    """What an undisturbed job in this process makes of all rows."""
    output = source.with_name("whole")
    assert command("generate", *kills.arguments(source, output)).code == 0
    return kills.contents(output)


class TestActors:
    @pytest.mark.usefixtures("cluster")
    def test_two_actors_of_which_some_are_killed_make_what_one_process_makes(
        self, source: Path, tmp_path: Path, whole: list[dict[str, Any]]
    ) -> None:
        more = ("engine=ray", "engine.actors=2", "engine.batch_size=3")
        with kills.ActorKiller(tmp_path / "out", kills.KILLS) as killer:
            result = command("generate", *kills.arguments(source, tmp_path / "out", *more))
        assert result.code == 0, result.err
        print(f"{killer.killed} actors were killed")
        assert killer.killed >= kills.KILLS * 4 // 5  # the job may end before the last ones
        assert kills.contents(tmp_path / "out") == whole
        assert sum(row["error"] is not None for row in whole) == 1

    @pytest.mark.usefixtures("cluster")
    def test_a_refusal_of_an_actor_is_one_line(self, source: Path, tmp_path: Path) -> None:
        result = command("generate", *kills.arguments(source, tmp_path / "out", "engine=ray", "gen_length=1000"))
        assert (result.code, result.err.count("\n")) == (2, 1)  # Ray may tell of an actor that died, on stdout
        assert "gen_length=1000" in result.err
        assert not (tmp_path / "out").exists()

    def test_an_actor_is_a_decoder_with_tables(self) -> None:
        rows = [
            jobs.Row(0, "a", "Tom"),
            jobs.Row(1, 7, [{"role": "user", "content": "Ann"}]),
            jobs.Row(2, "c", None, "no"),
        ]
        told = engines._Actor(setting(), 2)(engines._table(rows))
        found = {result.number: result for _, (result,) in engines._read(told)}
        assert [found[n].id for n in range(3)] == ["a", 7, "c"]
        assert [found[n].error for n in range(3)] == [None, None, "no"]
        (expected,) = dllm.generate(LM, ["Tom"], "threshold", gen_length=8).texts
        assert found[0].text == expected

    def test_a_model_that_is_refused_decodes_nothing(self) -> None:
        def check(model: dict[str, Any]) -> None:
            raise ValueError(f"not {sorted(model)[0]}")

        actor = engines._Actor(jobs.Setting(**{**vars(setting()), "check": check}), 2)
        with pytest.raises(ValueError, match=r"^not eos$"):
            list(engines._read(actor(pa.table({}))))

    def test_a_policy_that_is_at_fault_is_no_refusal(self) -> None:
        actor = engines._Actor(setting(), 2)
        actor._decoder.decode = lambda rows: 1 / 0  # type: ignore[assignment,method-assign,return-value]
        with pytest.raises(ZeroDivisionError):
            actor(pa.table({}))


@pytest.mark.skipif(kills.KILLS < 5, reason="starts Ray many times; DLLM_KILLS=25 does so")
def test_a_job_on_ray_survives_kills_of_its_driver(source: Path, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    chance, output = random.Random(1), tmp_path / "out"
    asked = kills.arguments(source, output, "engine=ray", "engine.actors=2")
    killed = [kills.kill_process(start("generate", *asked), output, chance) for _ in range(kills.KILLS)]
    print(f"{sum(killed)} drivers were killed, until {kills.shards(output)} of {kills.ROWS // 4} files were there")
    assert all(killed)
    assert start("generate", *asked).wait(600) == 0
    assert kills.contents(output) == whole


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("engine.actors=0", "engine.actors=0 is out of range; use a whole number of at least 1"),
        ("engine.cpus_per_actor=0", "engine.cpus_per_actor=0 is out of range"),
        ("engine.batch_size=0", "engine.batch_size=0 is out of range; use a whole number of at least 1, or null"),
        ("engine.gpus_per_actor=-1", "engine.gpus_per_actor=-1 is out of range; use 0 or a positive number, or null"),
        ("engine.actors=two", "engine.actors='two' is of the wrong type; give a whole number"),
        ("output=a.jsonl", "engine=ray has no effect without a job"),
        ("engine.address=127.0.0.1:1", "engine.address='127.0.0.1:1': Ray cannot be reached (["),
    ],
)
def test_bad_options_are_one_line(argument: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # an address is of no use to one that is there
    Path("q.jsonl").write_text('{"prompt": "Tom"}\n')
    given = ["input=q.jsonl", *(() if argument.startswith("output") else ("output=out",)), "engine=ray", argument]
    result = command("generate", *given)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert said in result.err


@pytest.mark.usefixtures("cluster")
def test_more_gpus_than_there_are_is_one_line(source: Path, tmp_path: Path) -> None:
    there = int(ray.cluster_resources().get("GPU", 0))
    more = ("engine=ray", f"engine.actors={there + 1}", "engine.gpus_per_actor=1")
    result = command("generate", *kills.arguments(source, tmp_path / "out", *more))
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert (
        f"engine.actors={there + 1} with engine.gpus_per_actor=1 needs {there + 1} GPUs, and this machine has"
        in result.err
    )


def test_a_divided_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n')
    given = (f"input={tmp_path / 'q.jsonl'}", f"output={tmp_path}/out/", "model.tp=true", "engine=ray")
    outcome = command("generate", *given)
    assert (outcome.code, outcome.err) == (
        2,
        "dllm generate: error: engine=ray is not supported with model.tp=true; use engine=local, or model.tp=false "
        "without torchrun\n",
    )
