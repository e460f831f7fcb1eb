"""`dllm caches`: the table of all caches with some policies; `dllm tradeoff` over a product of settings."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

from typing import Any

from omegaconf import DictConfig, OmegaConf

from dllm.scripts import app
from dllm.scripts.tradeoff import KINDS, tradeoff


def main() -> None:
    """Entry point."""
    app.run(caches, "caches", KINDS)


def caches(cfg: DictConfig) -> None:
    """Measure every cache with every policy."""
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    fields["settings"] = {
        f"{cache}, {sampler}": policy | {"cache": options}
        for sampler, policy in fields["samplers"].items()
        for cache, options in fields["caches"].items()
    }
    tradeoff(OmegaConf.create(fields), "caches", cost="positions")
