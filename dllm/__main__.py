"""`python -m dllm`: the `dllm` command."""

from __future__ import annotations

if __name__ == "__main__":
    from dllm.scripts.cli import main

    main()
