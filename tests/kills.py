"""Killing jobs at random moments: how often is set by DLLM_KILLS, with twenty rows for each kill."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from pyarrow import parquet

from dllm.tasks import word_problems
from warm import Process

KILLS = int(os.environ.get("DLLM_KILLS", "2"))
ROWS = 20 * KILLS
_PATIENCE = 300  # seconds without any progress


def write_rows(path: Path, count: int = ROWS) -> None:
    """Word problems of many lengths, one of which is too long for the model."""
    asked = [{"id": f"p{n}", "prompt": each.question} for n, each in enumerate(word_problems.problems(count, seed=5))]
    asked[count // 2]["prompt"] *= 40
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))


def arguments(source: Path, output: Path, *more: str) -> list[str]:
    """A job in float64, so that results do not depend on the rows that are decoded together."""
    plain = ("sampler=tiny/threshold", "gen_length=16", "block_length=16", "model.dtype=float64", "show=none")
    return [f"input={source}", f"output={output}", *plain, "engine.shard_rows=4", *more]


def shards(output: Path) -> int:
    """Finished shards: all of them can be read, and no row is there twice."""
    found = sorted(output.glob("rows-*.parquet"))
    ids = [name for path in found for name in parquet.read_table(path, columns=["id"])["id"].to_pylist()]
    assert len(ids) == len(set(ids))
    return len(found)


def contents(output: Path) -> list[dict[str, Any]]:
    return parquet.read_table(output).to_pylist()


def some_later(output: Path, chance: random.Random, alive: Callable[[], bool] = lambda: True) -> None:
    """Wait for up to two more shards, and a moment."""
    until, wanted = time.monotonic() + _PATIENCE, shards(output) + chance.randrange(3)
    while shards(output) < wanted and alive():
        assert time.monotonic() < until
        time.sleep(0.005)
    time.sleep(chance.random() * 0.3)


def kill_process(process: Process, output: Path, chance: random.Random) -> bool:
    """Kill a process with SIGKILL at a random moment of its work; whether it had not ended before."""
    some_later(output, chance, lambda: process.poll() is None)
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


class ActorKiller(threading.Thread):
    """Kills actors of the Ray of this process, at random moments of their work."""

    def __init__(self, output: Path, kills: int) -> None:
        super().__init__(daemon=True)
        self.output, self.left, self.killed, self._done = output, kills, 0, threading.Event()

    def run(self) -> None:
        chance = random.Random(0)
        while self.left and not self._done.is_set():
            some_later(self.output, chance, lambda: not self._done.is_set())
            if working := _actors():
                chance.choice(working).kill()
                self.left, self.killed = self.left - 1, self.killed + 1

    def __enter__(self) -> ActorKiller:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self.join()


def _actors() -> list[psutil.Process]:
    """Actors that are decoding."""
    found = []
    for each in psutil.Process().children(recursive=True):
        try:
            if "ray::MapWorker" in " ".join(each.cmdline()) and "__init__" not in " ".join(each.cmdline()):
                found.append(each)
        except psutil.Error:
            continue
    return found
