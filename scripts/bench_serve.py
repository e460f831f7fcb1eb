"""`dllm bench-serve`: load on a running server, or on one that it starts."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import csv
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dllm.checks import number, seed
from dllm.escape import cell, markdown_table, terminal
from dllm.evaluation.jsonl import read_questions
from dllm.resolve import options_of
from dllm.scripts import app, own
from dllm.scripts.ending import in_loop, tied
from dllm.tasks import word_problems

if TYPE_CHECKING:
    from dllm.serving.load import Load, Row

KINDS = {
    "rate": float | str | Sequence[Any] | None, "load": float | Sequence[Any], "requests": int | None,
    "duration": float | None, "clients": int | None, "max_tokens": int | None, "deadline": float | None,
    "timeout": float, "serve": dict | None, "fields": dict | None,
    **dict.fromkeys(("server", "api_key", "input", "out"), str | None),
}  # fmt: skip
_CAPACITY = "capacity"
_COMMAND = (sys.executable, "-m", "dllm.scripts.cli", "serve")
_GROUPS = ("model", "sampler", "cache")
_PROMPTS = 500  # word problems; further requests begin again
_MOST_CLIENTS = 10_000
_STOP_SECONDS = 60
_RESERVED = ("model", "prompt", "messages", "max_tokens", "stream", "stream_options")
_HOST, _KEY = "127.0.0.1", "DLLM_API_KEY"
_LATE = 0.1  # seconds


def main() -> None:
    """Entry point."""
    app.run(bench_serve, "bench_serve", KINDS)


def bench_serve(cfg: DictConfig) -> None:
    """Put load on a server; print a table, and write `out`.jsonl and `out`.csv if `out` is given."""
    options: Any = OmegaConf.to_container(cfg, resolve=True)
    rates = _check(options)
    import dllm.serving.client  # names what is missing without the extra
    from dllm.serving.load import Load, Plan, Target

    asked, key, server = _asked(options), options["api_key"] or os.environ.get(_KEY) or None, options["server"]
    running: AbstractContextManager[psutil.Process | None] = nullcontext(None)
    if server is None:
        port = _free_port()
        server, key, running = (
            f"http://{_HOST}:{port}",
            (options["serve"] or {}).get("api_key"),
            _started(port, options),
        )
    dllm.serving.client.settings_of(server, key, None)
    target = Target(server, key, asked, options["max_tokens"], options["timeout"], options["fields"] or {})
    names = ("requests", "duration", "deadline", "clients", "seed")
    _allow_connections()
    with running as process:
        load = Load(target, Plan(**{name: options[name] for name in names}), lambda: _memory(process), in_loop)
        try:
            _run(load, rates)
        finally:  # also what an interrupted load has
            _tell(load, options["out"])


def _run(load: Load, rates: Sequence[Mapping[str, float]]) -> None:
    """Put load on the server, as the arguments of `Load.put` say."""
    if any("multiple" in rate for rate in rates):
        print("measuring the capacity", file=sys.stderr, flush=True)
        capacity, row = load.measure_capacity(), load.rows[-1]
        busy = "" if row.busy is None else f", {row.busy:.0%} of the slots busy"
        print(f"capacity {capacity:.2f} requests/s with {row.clients} clients{busy}", file=sys.stderr, flush=True)
    else:
        load.warm_up()
    for rate in rates:
        row = load.put(**rate)
        print(f"{row.rate:.2f} requests/s: {row.finished} of {row.requests} finished", file=sys.stderr, flush=True)


def _check(options: Mapping[str, Any]) -> list[dict[str, float]]:
    """Refuse bad options before anything is started; return the arguments of `Load.put` for each rate."""
    given = app.given()
    if options["server"] is not None:
        for name in sorted(given):
            if name.partition(".")[0] in (*_GROUPS, "serve"):
                raise ValueError(f"{name} has no effect with server, which has its own; leave it out")
    elif options["api_key"] is not None:
        raise ValueError("api_key has no effect without server; give both, or leave it out")
    for name in ("requests", "max_tokens"):
        if options[name] is not None:
            number(name, options[name], "a whole number of at least 1, or null", low=1, whole=True)
    if options["clients"] is not None:
        use = f"a whole number from 1 to {_MOST_CLIENTS}, or null"
        number("clients", options["clients"], use, low=1, high=_MOST_CLIENTS, whole=True)
    for name in ("duration", "deadline", "timeout"):
        if options[name] is not None:
            number(name, options[name], "a number of seconds above 0, up to 1000000", above=0, high=1e6)
    seed("seed", options["seed"])
    for group, reserved in (("fields", _RESERVED), ("serve", ("host", "port", *_GROUPS))):
        for name in options[group] or {}:
            if str(name).partition(".")[0] in reserved:
                raise ValueError(f"{group}.{name} is set by the command itself; leave it out")
    _check_fields(options["fields"] or {})
    if not isinstance(key := (options["serve"] or {}).get("api_key"), str | None):
        raise ValueError(f"serve.api_key={key!r} is of the wrong type; give text in quotes")
    if options["out"] is not None:
        if not os.path.basename(options["out"]).strip("."):  # noqa: PTH119  # Path drops a / at the end
            raise ValueError(f"out={options['out']!r} is a folder; give the beginning of a file's name, such as load")
        own.check("out", options["out"], _files(options["out"]))
    if options["rate"] is None:
        return [{"multiple": each} for each in _numbers("load", options["load"])]
    if any(name == "load" for name in given):
        raise ValueError("rate and load are mutually exclusive; give one of them")
    rates = _numbers("rate", options["rate"], _CAPACITY)
    return [{"multiple": 1.0} if each == _CAPACITY else {"rate": each} for each in rates]


def _check_fields(fields: Mapping[Any, Any]) -> None:
    """Refuse fields that no request can have."""
    for name, value in fields.items():
        if not isinstance(name, str):
            raise ValueError(f"fields has the name {name!r}, which is no text; put it in quotes")
        if not _is_json(value):
            raise ValueError(f"fields.{name}={value!r} is not valid in JSON; give finite numbers")


def _is_json(value: Any) -> bool:
    """Whether a request can have a value."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return False
    return True


def _numbers(name: str, given: Any, word: str | None = None) -> list[Any]:
    """A number or a list of numbers above 0, or a word for one of them."""
    values = given if isinstance(given, list) else [given]
    if not values:
        raise ValueError(f"{name}=[] is empty; give at least one number")
    use = "a number above 0" + (f", or {word}" if word else "")
    for place, value in enumerate(values):
        if word is None or value != word:
            number(f"{name}[{place}]" if isinstance(given, list) else name, value, use, above=0, high=1e6)
    return values


def _asked(options: Mapping[str, Any]) -> list[Any]:
    """Prompts and chats in random order: lines of the input, or word problems, some after a solved one."""
    draw = random.Random(options["seed"])
    if options["input"] is not None:
        questions = read_questions(Path(options["input"]))
        for question in questions:
            if not _is_json(question.prompt):
                raise ValueError(
                    f"{question.place} has a number that is not finite, which no request can have; remove it"
                )
        asked: list[Any] = [question.prompt for question in questions]
    else:
        solved, problems = (word_problems.problems(_PROMPTS, seed=2 * options["seed"] + part) for part in range(2))
        asked = [problem.question for problem in problems]
        for place in range(0, _PROMPTS, 2):
            asked[place] = f"{solved[place].question} {solved[place].solution}\n{asked[place]}"
    draw.shuffle(asked)
    return asked


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((_HOST, 0))
        return int(listening.getsockname()[1])


@contextmanager
def _started(port: int, options: Mapping[str, Any]) -> Iterator[psutil.Process]:
    """A server of this machine, until the end of the context.

    Raises:
        ValueError: it does not start.
    """
    arguments = [f"host={_HOST}", f"port={port}", *_chosen(options)]
    arguments += [app.argument(str(name), value) for name, value in (options["serve"] or {}).items()]
    environment = {name: value for name, value in os.environ.items() if name != _KEY}
    with tempfile.TemporaryFile() as said:
        print("starting the server", file=sys.stderr, flush=True)
        process = subprocess.Popen(
            tied([*_COMMAND, *arguments]), stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment
        )
        try:
            while not _is_ready(port):
                if process.poll() is not None:
                    raise ValueError(f"the server did not start: {_last_line(said)}")
                time.sleep(0.1)
            try:
                yield psutil.Process(process.pid)
            finally:
                if process.poll() is not None and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                    raise ValueError(f"the server ended during the load: {_last_line(said)}") from None
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _chosen(options: Mapping[str, Any]) -> list[str]:
    """The model, the sampler and the cache as arguments of another command."""
    arguments = []
    for group in _GROUPS:
        name = HydraConfig.get().runtime.choices[group]
        defaults = options_of(group, name)
        changed = {key: value for key, value in options[group].items() if value != defaults.get(key)}
        arguments += [f"{group}={name}", *(app.argument(f"{group}.{key}", value) for key, value in changed.items())]
    return arguments


def _is_ready(port: int) -> bool:
    import httpx

    with suppress(httpx.HTTPError):
        return httpx.get(f"http://{_HOST}:{port}/ready", trust_env=False).status_code == 200
    return False


def _last_line(said: IO[bytes]) -> str:
    """What the server wrote last, other than its log."""
    said.seek(0)
    lines = [each for each in said.read().decode(errors="replace").strip().splitlines() if not each.startswith("{")]
    return (lines or ["it ended without a word"])[-1].removeprefix("dllm serve: error: ")


def _memory(process: psutil.Process | None) -> int | None:
    """Bytes that a process and those it started occupy; None without one."""
    if process is None:
        return None
    with suppress(psutil.Error):
        return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
    return None


def _allow_connections() -> None:
    """Raise the limit of open files to the highest allowed: every request has a connection of its own."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _tell(load: Load, out: str | None) -> None:
    """Write the records, and print the table."""
    from dllm.serving.client import shown

    if not load.rows:
        return
    capacity = "" if load.capacity is None else f", capacity {load.capacity:.2f} requests/s"
    server = shown(load.target.server)
    text = [f"{terminal(server)}, {terminal(load.model, one_line=True)}{capacity}\n", _table(load.rows)]
    errors = [f"{count} times: {said}" for row in load.rows for said, count in row.errors.items()]
    text += [terminal(error, one_line=True) for error in dict.fromkeys(errors)]
    if (late := max(row.lag_p99 or 0.0 for row in load.rows)) > _LATE:
        text.append(
            f"requests were sent up to {late:.2f} s late (p99): this machine is too busy to send at these rates"
        )
    rows = [{"server": server, "model": load.model, "capacity": load.capacity, **asdict(row)} for row in load.rows]
    files = {} if out is None else {path: (kind, _written(path, rows)) for path, kind in _files(out).items()}
    own.write_and_print(out, files, "\n".join(text))


def _table(rows: Sequence[Row]) -> str:
    head = [
        "load", "requests/s", "achieved", "goodput", "finished", "refused", "failed", "first text s, p50 p95 p99",
        "whole s, p50 p95 p99", "tokens/s", "busy", "RSS MiB",
    ]  # fmt: skip
    if any(row.unfinished for row in rows):
        head.insert(7, "unfinished")
    cells = []
    for row in rows:
        line = [
            _CAPACITY if row.clients is not None else "" if row.load is None else f"{row.load:g}",
            f"{row.rate:.2f}",
            f"{row.achieved:.2f}",
            f"{row.goodput:.2f}",
            f"{row.finished} of {row.requests}",
            str(row.refused),
            str(row.failed),
            _seconds(row.first_p50, row.first_p95, row.first_p99),
            _seconds(row.whole_p50, row.whole_p95, row.whole_p99),
            f"{row.tokens_per_second:.1f}",
            "" if row.busy is None else f"{row.busy:.0%}",
            "" if not row.rss_start or not row.rss_end else f"{row.rss_start >> 20} to {row.rss_end >> 20}",
        ]
        cells.append([*line[:7], *([str(row.unfinished)] if "unfinished" in head else []), *line[7:]])
    return markdown_table(head, cells)


def _seconds(*values: float | None) -> str:
    return "  ".join("" if value is None else f"{value:.2f}" for value in values).strip()


def _files(out: str) -> dict[Path, own.Kind]:
    return {Path(out + ending): kind for ending, kind in own.LOAD.items()}


def _written(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as JSON lines, or as CSV."""
    if path.suffix == ".jsonl":
        records = ({"format": own.LOAD_FORMAT, "version": 1, **row} for row in rows)
        return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([cell(json.dumps(value) if isinstance(value, dict) else value) for value in row.values()]
                     for row in rows)  # fmt: skip
    return file.getvalue()
