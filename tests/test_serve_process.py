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


def busy(url: str, waiting: int = 0) -> bool:
    """Whether a request is decoded, and as many others wait."""
    lines = httpx.get(f"{url}metrics").text.splitlines()
    slots, queue = (
        float(next(line for line in lines if line.startswith(name)).split()[1])
        for name in ("dllm_slots_busy ", "dllm_queue_length ")
    )
    return slots > 0 and queue >= waiting


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_what_runs_finish(number: signal.Signals, code: int) -> None:
    process, url = started("batch_size=2")
    answers: list[Any] = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}v1/completions", json=LONG, timeout=120))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not busy(url, waiting=1):
        time.sleep(0.02)
    time.sleep(0.3)  # all three have arrived
    process.send_signal(number)
    for thread in threads:
        thread.join(120)
    assert [answer.status_code for answer in answers] == [200] * 3
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    *log, last = err.splitlines()
    assert [json.loads(line)["outcome"] for line in log] == ["finished"] * 3
    assert last == "dllm serve: stopped"
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
