"""`dllm policies`: the table of all unmasking policies; `dllm tradeoff` with other settings."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

from functools import partial

from dllm.scripts import app
from dllm.scripts.tradeoff import KINDS, tradeoff


def main() -> None:
    """Entry point."""
    app.run(partial(tradeoff, command="policies"), "policies", KINDS)
