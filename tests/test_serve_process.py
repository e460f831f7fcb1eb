"""The server as a process: signals under load."""

from __future__ import annotations

import json
import signal
import threading
import time
from typing import Any

import pytest

from commands import in_a_process, start

httpx = pytest.importorskip("httpx")
for needed in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(needed)

from serve_rig import QUESTION  # noqa: E402

pytestmark = in_a_process
LONG = {"prompt": QUESTION, "max_tokens": 120, "dllm": {"stop_at_eos": False, "block_length": 120}}


def started(*arguments: str) -> tuple[Any, str]:
    process = start("serve", "port=0", *arguments)
    line = process.stdout.readline()
    assert " at http://127.0.0.1:" in line, (line, process.stderr.read())
    return process, line.split()[-1]


def busy(url: str) -> bool:
    lines = httpx.get(f"{url}metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("dllm_slots_busy ")).split()[1]) > 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_what_runs_finish(number: signal.Signals, code: int) -> None:
    process, url = started("batch_size=2")
    answers: list[Any] = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}v1/completions", json=LONG, timeout=120))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not busy(url):
        time.sleep(0.02)
    process.send_signal(number)
    for thread in threads:
        thread.join(120)
    codes = [answer.status_code for answer in answers]
    assert 200 in codes
    assert set(codes) <= {200, 503}  # 503: it came after the signal
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    *log, last = err.splitlines()
    outcomes = [json.loads(line)["outcome"] for line in log]
    assert sorted(outcomes) == ["finished"] * codes.count(200) + ["refused"] * codes.count(503)
    assert last.startswith("dllm serve: error: ")
    assert "Traceback" not in err


def test_a_second_signal_ends_at_once() -> None:
    process, url = started("batch_size=1")
    thread = threading.Thread(target=lambda: _ignore(url))
    thread.start()
    while not busy(url):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "Traceback" not in err
    thread.join(20)


def _ignore(url: str) -> None:
    try:
        httpx.post(f"{url}v1/completions", json=LONG | {"max_tokens": 450}, timeout=60)
    except httpx.HTTPError:
        return
