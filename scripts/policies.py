"""`dllm policies`: the table of all unmasking policies; `dllm tradeoff` with other settings."""

from __future__ import annotations

if __name__ == "__main__":  # first of all, so that signals are heard while the rest is imported
    from dllm.scripts.cli import main as _main

    _main("policies")
    raise SystemExit

from functools import partial

from dllm.scripts import app
from dllm.scripts.tradeoff import KINDS, tradeoff


def main() -> None:
    """Entry point."""
    app.run(partial(tradeoff, command="policies"), "policies", KINDS)
