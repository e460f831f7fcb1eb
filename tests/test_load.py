"""`dllm bench-serve`: load that does not wait for the server, what is counted, and a server of its own."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from commands import Outcome, command, unread
from fake_server import FakeServer, serving
from models import random_llada

pytest.importorskip("httpx")

from dllm.scripts import bench_serve
from dllm.scripts.app import rewrite
from dllm.serving import load
from dllm.serving.client import ServerError
from dllm.serving.load import Load, Plan, Record, Target, arrivals, summarise

FULL = {"error": {"message": "the queue is full"}}


def target(server: FakeServer, **options: Any) -> Target:
    return Target(server.url, None, ["Tom?", [{"role": "user", "content": "Ann?"}]], **options)


def record(arrival: float, first: float | None, ended: float, outcome: Any = "finished", tokens: int = 10) -> Record:
    return Record(arrival, arrival, first, ended, outcome, tokens)


class TestArrivals:
    def test_are_poisson(self) -> None:
        times = np.array(list(arrivals(4.0, 4000, None, seed=1)))
        gaps = np.diff(times, prepend=0.0)
        assert len(times) == 4000
        assert times[-1] == pytest.approx(1000, rel=0.05)
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)

    def test_another_rate_stretches_them(self) -> None:
        slow, fast = (list(arrivals(rate, 50, None, seed=3)) for rate in (1.0, 5.0))
        assert slow == pytest.approx([5 * at for at in fast])
        assert slow != list(arrivals(1.0, 50, None, seed=4))

    def test_end_with_the_number_or_the_duration(self) -> None:
        timed = list(arrivals(2.0, None, 30.0, seed=0))
        assert timed == list(islice(arrivals(2.0, None, None, seed=0), len(timed)))
        assert timed[-1] <= 30.0 < next(islice(arrivals(2.0, None, None, seed=0), len(timed), None))
        assert len(list(arrivals(2.0, 5, 30.0, seed=0))) == 5


class TestStatistics:
    def test_times_count_from_the_arrival(self) -> None:
        rows = [record(float(at), at + 0.5 + at / 100, at + 1 + at / 50) for at in range(101)]
        row = summarise(rows, 1.0, None, deadline=None)
        assert (row.first_p50, row.first_p95, row.first_p99) == pytest.approx((1.0, 1.45, 1.49))
        assert (row.whole_p50, row.whole_p95, row.whole_p99) == pytest.approx((2.0, 2.9, 2.98))
        assert row.seconds == pytest.approx(103)
        assert row.achieved == row.goodput == pytest.approx(101 / 103)
        assert row.tokens_per_second == pytest.approx(1010 / 103)
        assert row.offered == pytest.approx(1.01)

    def test_goodput_is_within_the_deadline(self) -> None:
        rows = [record(0, 1, 2), record(1, 2, 4.5), record(2, 3, 4)]
        row = summarise(rows, 1.0, 0.5, deadline=2.0)
        assert (row.achieved, row.goodput) == pytest.approx((3 / 4.5, 2 / 4.5))

    def test_only_finished_requests_have_times_and_tokens(self) -> None:
        rows = [
            record(0, 1, 2),
            record(0, None, 9, "refused"),
            record(0, 8, 10, "failed"),
            replace(record(1, 3, 0, "unfinished"), ended=None),
            record(1, None, 2),
        ]
        rows[1].error = rows[2].error = "no"
        row = summarise(rows, 1.0, None, None)
        assert (row.requests, row.finished, row.refused, row.failed, row.unfinished) == (5, 2, 1, 1, 1)
        assert (row.first_p99, row.whole_p99) == pytest.approx((1.0, 1.99))
        assert (row.seconds, row.tokens_per_second, row.errors) == (10, 2.0, {"no": 2})

    def test_without_requests_there_are_no_numbers(self) -> None:
        row = summarise([], 1.0, None, None)
        assert (row.requests, row.achieved, row.offered, row.whole_p50, row.lag_p99) == (0, 0.0, 0.0, None, None)


class TestOpenLoop:
    def test_arrivals_do_not_wait_for_a_slow_server(self) -> None:
        with serving(slots=1, seconds=0.2) as server:
            bench = Load(target(server), Plan(requests=20))
            records: list[Record] = []
            asyncio.run(load.open_loop(bench.target, "fake", arrivals(100.0, 20, None, 0), records))
        assert all(each.outcome == "finished" for each in records)
        assert max(each.sent - each.arrival for each in records) < 2  # of the 4 seconds that the answers take
        ended = [each.ended or 0.0 for each in records]
        assert max(ended) > 19 * 0.2  # one after the other
        row = summarise(records, 100.0, None, None)
        assert row.whole_p50 is not None
        assert row.whole_p50 > 1.5  # waiting counts

    def test_answers_without_text_count_in_both_times(self) -> None:
        row = summarise([record(0.0, 1.0, 3.0), record(0.0, None, 0.5), record(0.0, None, 0.6)], 1.0, None, None)
        assert (row.first_p50, row.whole_p50) == (0.6, 0.6)
        assert row.first_p99 is not None and row.whole_p99 is not None
        assert row.first_p99 < row.whole_p99

    def test_time_to_the_first_text_is_not_that_to_the_last(self) -> None:
        with serving(seconds=0.4) as server:
            row = Load(target(server), Plan(requests=4)).put(rate=50.0)
        assert row.first_p50 is not None
        assert row.whole_p50 is not None
        assert row.first_p50 > 0.19
        assert row.whole_p50 > row.first_p50 + 0.1
        assert row.finished == 4
        assert row.tokens_per_second * row.seconds == pytest.approx(40)

    def test_refusals_and_errors_are_counted_apart(self) -> None:
        with serving(seconds=0.1) as server:
            server.scripted = [
                (429, {"Retry-After": "1"}, FULL), (429, {}, FULL), (500, {}, "x"),
                b'data: {"error": {"message": "a"}}\n\n', b'data: {"choices": [{"text": "begun"}]}\n\n',
            ]  # fmt: skip
            row = Load(target(server), Plan(requests=8)).put(rate=200.0)
        assert (row.finished, row.refused, row.failed, row.requests) == (3, 2, 3, 8)
        assert row.errors["the server ended the answer: a"] == 1
        assert sum(row.errors.values()) == 5

    def test_a_full_queue_refuses_and_the_rest_finishes(self) -> None:
        with serving(slots=1, seconds=0.1, queue=2) as server:
            row = Load(target(server), Plan(requests=30)).put(rate=300.0)
        assert row.finished + row.refused == 30
        assert row.finished >= 3
        assert row.refused >= 10

    def test_a_request_without_an_answer_fails_in_time(self) -> None:
        with serving(seconds=60) as server:
            row = Load(target(server, timeout=0.2), Plan(requests=3)).put(rate=100.0)
        assert (row.failed, row.errors) == (3, {"no answer within 0.2 s": 3})

    def test_hundreds_of_requests_wait_at_the_same_time(self) -> None:
        with serving(slots=1000, seconds=1.0) as server:
            row = Load(target(server), Plan(requests=300)).put(rate=1000.0)
        assert row.finished == 300
        assert row.seconds < 60  # one after the other they would take 300

    def test_prompts_and_chats_go_to_their_addresses(self) -> None:
        with serving() as server:
            Load(target(server, max_tokens=7, fields={"dllm": {"top_k": 3}}), Plan(requests=3)).put(rate=500.0)
        paths = {path: body for path, _, body in server.asked}
        assert set(paths) == {"/v1/completions", "/v1/chat/completions"}
        assert paths["/v1/completions"] == {
            "model": "fake", "prompt": "Tom?", "stream": True, "stream_options": {"include_usage": True},
            "max_tokens": 7, "dllm": {"top_k": 3},
        }  # fmt: skip

    def test_busy_slots_are_those_of_the_steps_between(self) -> None:
        with serving() as server:
            server.steps, server.busy = 1000.0, 0.0
            row = Load(target(server), Plan(requests=3)).put(rate=500.0)
        assert row.busy == pytest.approx(0.75)
        assert load.busy_share({}, {}) is None

    def test_a_server_that_goes_away_is_counted(self) -> None:
        with serving() as server:
            bench = Load(target(server), Plan(requests=3))
        row = bench.put(rate=100.0)
        assert (row.failed, row.busy) == (3, None)
        assert "cannot be reached" in next(iter(row.errors))


class TestCapacity:
    def test_is_what_busy_slots_answer(self) -> None:
        with serving(slots=4, seconds=0.1) as server:
            bench = Load(target(server), Plan(requests=40))
            assert 10 < bench.measure_capacity() < 44  # one slot answers 10 a second, all of them 40
            assert bench.put(multiple=0.5).rate == pytest.approx(0.5 * (bench.capacity or 0))
            assert max(len(server.asked) - 40, 0) == 40

    def test_is_a_row_of_its_own_that_tells_how_busy_the_slots_were(self) -> None:
        with serving(slots=4, seconds=0.1) as server:
            bench = Load(target(server), Plan(requests=40, deadline=60.0))
            capacity = bench.measure_capacity()
            (row,) = bench.rows
            assert (row.clients, row.load, row.rate, row.offered) == (8, None, capacity, capacity)
            assert row.busy == pytest.approx(0.75)  # as this server says
            assert row.achieved == row.goodput == pytest.approx(capacity, rel=0.1)
            assert row.finished == row.requests > 20
            assert row.whole_p50 is not None
            assert row.whole_p50 > 0.15  # half of the clients wait for a slot
            assert bench.put(rate=100.0).clients is None

    def test_every_slot_has_a_next_request_waiting(self) -> None:
        for needed in ("fastapi", "prometheus_client", "uvicorn"):
            pytest.importorskip(needed)
        from serve_rig import serving as serving_model

        with serving_model(random_llada(tokenizer=True, max_length=64), batch_size=4, gen_length=24) as running:
            bench = Load(Target(running.url, None, ["Tom has 3 apples."]), Plan(requests=48))
            bench.measure_capacity()
            assert (bench.rows[0].busy or 0.0) >= 0.9
            assert bench.rows[0].clients == 8

    def test_survives_refusals(self) -> None:
        with serving(slots=2, seconds=0.05, queue=0) as server:
            assert Load(target(server), Plan(requests=16, clients=3)).measure_capacity() > 1

    @pytest.mark.parametrize("status", [429, 500])
    def test_cannot_be_measured_where_nothing_is_answered(self, status: int) -> None:
        with serving() as server:
            server.scripted = [(status, {"Retry-After": "0.001"}, FULL)] * 200
            with pytest.raises(ServerError, match=r"the capacity cannot be measured: .*queue is full.*; give rate"):
                Load(target(server), Plan(requests=4, clients=1)).measure_capacity()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(seconds=0.01) as running:
        yield running


class TestCommand:
    def test_prints_a_table_and_writes_records(self, server: FakeServer, tmp_path: Path) -> None:
        out = tmp_path / "new" / "load"
        arguments = (f"server={server.url}", "rate=[100,200]", "requests=10", "deadline=1", f"out={out}")
        for _ in range(2):  # its own files are written again
            result = command("bench-serve", *arguments)
            assert result.code == 0, result.err
        head, _, first, second = [each for each in result.out.splitlines() if each.startswith("|")]
        assert "| requests/s | achieved | goodput | finished |" in head
        assert "| 100.00 |" in first
        assert "| 10 of 10 | 0 | 0 |" in second
        rows = [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]
        assert [(row["format"], row["rate"], row["finished"]) for row in rows] == [
            ("dllm-load", 100, 10),
            ("dllm-load", 200, 10),
        ]
        with Path(f"{out}.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert [float(row["goodput"]) for row in table] == [row["goodput"] for row in rows]
        asked = [body["prompt"] for _, _, body in server.asked]  # those close together come in any order
        assert sorted(asked[8:18]) == sorted(asked[18:28])

    def test_records_are_written_even_if_nobody_reads_what_is_printed(self, server: FakeServer, tmp_path: Path) -> None:
        assert unread("bench-serve", f"server={server.url}", "rate=200", "requests=3", f"out={tmp_path}/load") == 1
        assert {path.name for path in tmp_path.iterdir()} == {"load.jsonl", "load.csv"}

    def test_loads_are_multiples_of_the_capacity(self, server: FakeServer) -> None:
        result = command("bench-serve", f"server={server.url}", "load=[0.5,2]", "requests=32")
        capacity = float(re.findall(r"capacity ([\d.]+) requests/s", result.out)[0])
        assert re.search(rf"^\| capacity \| {capacity:.2f} \|.*\| 75% \|", result.out, re.MULTILINE)
        assert f"capacity {capacity:.2f} requests/s with 8 clients, 75% of the slots busy" in result.err
        rates = [float(line.split("|")[2]) for line in result.out.splitlines() if line.startswith(("| 0.5", "| 2 "))]
        assert rates == pytest.approx([capacity / 2, capacity * 2], rel=0.01)

    def test_the_capacity_may_be_the_rate(self, server: FakeServer) -> None:
        result = command("bench-serve", f"server={server.url}", "rate=capacity", "requests=32")
        assert len(re.findall(r"^\| 1 \|", result.out, re.MULTILINE)) == 1

    def test_lines_of_a_file_are_asked(self, server: FakeServer, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"prompt": "One?"}\n{"messages": [{"role": "user", "content": "Two?"}]}\n')
        command("bench-serve", f"server={server.url}", "rate=500", "requests=4", f"input={path}", "api_key=secret")
        asked = server.asked[-4:]
        assert [path for path, _, _ in asked].count("/v1/chat/completions") == 2
        assert all(headers["authorization"] == "Bearer secret" for _, headers, _ in asked)

    def test_an_interruption_prints_what_there_is(self, server: FakeServer, tmp_path: Path) -> None:
        server.seconds = 0.5

        def interrupt() -> None:
            while len(server.asked) < 4 + 8 + 1:  # one for each slot, the first rate, and one of the second
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        result = command("bench-serve", f"server={server.url}", "rate=[40,1]", "requests=8", f"out={tmp_path / 'l'}")
        assert result.code == 130
        assert "| 8 of 8 | 0 | 0 | 0 |" in result.out
        assert "unfinished" in result.out
        assert result.err.endswith("interrupted; what was written is kept\n")
        assert len((tmp_path / "l.jsonl").read_text().splitlines()) == 2

    def test_an_interruption_is_raised_after_the_event_loop(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.seconds, made, request, went_on = 0.5, count(), load.request, []

        def interrupt(*arguments: Any, **fields: Any) -> Any:
            if next(made) == 8:
                signal.raise_signal(signal.SIGTERM)
                went_on.append(True)
            return request(*arguments, **fields)

        monkeypatch.setattr(load, "request", interrupt)
        result = command("bench-serve", f"server={server.url}", "rate=1000", "requests=20")
        assert went_on == [True]
        assert (result.code, result.err) == (143, "dllm bench-serve: error: terminated; what was written is kept\n")
        assert "unfinished" in result.out

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["server=x"], "server='x' is not the address of a server"),
            (["server=http://127.0.0.1:9"], "http://127.0.0.1:9 cannot be reached"),
            (["server=http://x", "model=tiny-dream"], "model has no effect with server"),
            (["server=http://x", "sampler.tokens_per_step=2"], "sampler.tokens_per_step has no effect with server"),
            (["server=http://x", "serve={queue:3}"], "serve has no effect with server"),
            (["api_key=x"], "api_key has no effect without server"),
            (["rate=0"], "rate=0 is out of range; use a number above 0, or capacity"),
            (["rate=[1,-1]"], "rate[1]=-1 is out of range"),
            (["rate=fast"], "rate='fast' is out of range; use a number above 0, or capacity"),
            (["rate=[]"], "rate=[] is empty"),
            (["load=[]"], "load=[] is empty"),
            (["load=[capacity]"], "load[0]='capacity' is out of range; use a number above 0"),
            (["rate=1", "load=[1]"], "rate and load are mutually exclusive"),
            (["requests=0"], "requests=0 is out of range"),
            (["duration=0"], "duration=0 is out of range"),
            (["deadline=-1"], "deadline=-1 is out of range"),
            (["timeout=0"], "timeout=0 is out of range"),
            (["clients=0"], "clients=0 is out of range"),
            (["seed=-1"], "seed=-1 is out of range"),
            (["fields={stream:false}"], "fields.stream is set by the command itself"),
            (["serve={port:80}"], "serve.port is set by the command itself"),
            (["serve=3"], "serve=3 is of the wrong type"),
            (["fields=[1]"], "fields=[1] is of the wrong type"),
            (["input=/no/such"], "input='/no/such' cannot be read"),
        ],
    )
    def test_a_bad_option_is_one_line(self, arguments: list[str], named: str) -> None:
        result = command("bench-serve", *arguments)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result
        assert named in result.err


# What stands in for `dllm serve`.
STAND_IN = """
import json, sys, time
sys.path[:0] = [{tests!r}]
from fake_server import serving
options = dict(each.split("=", 1) for each in sys.argv[1:])
open({seen!r}, "w").write(json.dumps(options))
if options.get("queue") == "0":
    print("something else", "dllm serve: error: queue=0 is out of range", sep="\\n")
    sys.exit(2)
with serving(port=int(options["port"])):
    time.sleep(600)
"""


class TestOwnServer:
    @pytest.fixture
    def seen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        program, seen = tmp_path / "serve.py", tmp_path / "seen.json"
        program.write_text(STAND_IN.format(tests=str(Path(__file__).parent), seen=str(seen)))
        monkeypatch.setattr(bench_serve, "_COMMAND", (sys.executable, str(program)))
        return seen

    def run(self, *arguments: str) -> Outcome:
        return command("bench-serve", "rate=200", "requests=5", *arguments)

    def test_is_started_with_the_choices_and_stopped(self, seen: Path) -> None:
        others = set(psutil.Process().children())
        result = self.run("model=/some/fol der", "model.dtype=float64", "sampler=tiny/threshold", "cache=prefix",
                          "sampler.threshold=0.8", "serve={batch_size:3,stop:'a, b',name:null}")  # fmt: skip
        assert result.code == 0, result.err
        assert "| 5 of 5 |" in result.out
        assert re.search(r"\| \d+ to \d+ \|$", result.out, re.MULTILINE)
        options = json.loads(seen.read_text())
        GlobalHydra.instance().clear()
        with initialize_config_module("dllm.conf", version_base="1.3"):
            received = compose("serve", rewrite([f"{name}={value}" for name, value in options.items()], "serve"))
        assert (received.model.path, received.stop, received.batch_size) == ("/some/fol der", "a, b", 3)
        assert (received.sampler.threshold, received.model.dtype) == (0.8, "float64")
        port = options.pop("port")
        assert options == {
            "host": "127.0.0.1", "model": "custom", "model.path": "/some/fol der", "model.dtype": "'float64'",
            "sampler": "tiny/threshold", "sampler.threshold": "0.8", "cache": "prefix",
            "batch_size": "3", "stop": '"a, b"', "name": "null",
        }  # fmt: skip
        assert f"http://127.0.0.1:{port}" in result.out
        assert set(psutil.Process().children()) <= others

    def test_that_does_not_start_is_one_line(self, seen: Path) -> None:
        result = self.run("serve={queue:0}")
        assert (result.code, result.out) == (2, "")
        said = "dllm bench-serve: error: the server did not start: queue=0 is out of range"
        assert result.err.splitlines() == ["starting the server", said]

    def test_has_no_key_of_another(self, seen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DLLM_API_KEY", "of another server")
        begun = time.monotonic()
        assert self.run().code == 0
        assert time.monotonic() - begun < 30
