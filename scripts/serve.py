"""`dllm serve`: a server with OpenAI's interface and a page."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, get_type_hints

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import dllm
from dllm.cache.base import Cache
from dllm.checks import number
from dllm.decoding import compatibility
from dllm.resolve import build, options_of
from dllm.samplers.base import Sampler
from dllm.scripts import app
from dllm.scripts.ending import Stopped

_KINDS = get_type_hints(dllm.Options) | {
    "seed": int | None, "host": str, "port": int, "api_key": str | None, "name": str | None, "max_length": int | None,
    "samplers": Sequence[str] | None, "timeout": float, "drain": float, "io_timeout": float,
}  # fmt: skip
_OF_ENGINES = ("batch_size", "cfg_scale", "cuda_graphs", "seed")  # options that a request does not have
_COUNTS = {
    "port": (0, 65535),
    "engines": (1, 64),
    "queue": (0, 10**6),
    "max_body": (1, 2**31),
    "max_choices": (1, 1024),
}
_SECONDS = {"timeout": 0.1, "drain": 0, "io_timeout": 0.1}
_KEY = "DLLM_API_KEY"


def main() -> None:
    """Entry point."""
    app.run(serve, "serve", _KINDS)


def serve(cfg: DictConfig) -> None:
    """Run the command."""
    try:
        from dllm.serving.server import Server, listen
    except ModuleNotFoundError as error:
        raise ValueError(f"dllm serve needs {error.name}; pip install 'dllm-samplers[serve]'") from None
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    _check(fields)
    sampler, cache = build("sampler", cfg.sampler, Sampler), build("cache", cfg.cache, Cache)
    compatibility.check(sampler, cache, fields["cfg_scale"])
    with listen(fields["host"], fields["port"]) as listener:
        chosen = HydraConfig.get().runtime.choices
        service = make_service(fields, app.load_model(fields["model"]), sampler, cache, dict(chosen))

        def tell(url: str) -> None:
            print(f"{service.terms.name} with {service.sampler} and cache {service.cache} at {url}", flush=True)

        server = Server(service, listener, fields["drain"], tell)
        server.run()
    if server.signal is not None:
        raise Stopped(server.signal, expected=True)
    raise RuntimeError("the engine's thread ended")


def make_service(
    fields: Mapping[str, Any], lm: dllm.LanguageModel, sampler: Sampler, cache: Cache, chosen: Mapping[str, Any]
) -> Any:
    """What the server answers with.

    Args:
        fields: the options of the command.
        lm: the model.
        sampler: the policy.
        cache: the cache.
        chosen: names of the groups' choices.

    Raises:
        ValueError: an option that is out of range, or does not fit the model.
    """
    from dllm.serving.app import Service
    from dllm.serving.limits import Limits
    from dllm.serving.log import Log
    from dllm.serving.loop import Decoding, EngineLoop
    from dllm.serving.metrics import Metrics
    from dllm.serving.protocol import Terms
    from dllm.serving.server import offered
    from dllm.serving.ticket import SamplerChoice

    defaults = {name: fields[name] for name in dllm.Options.__dataclass_fields__ if name not in _OF_ENGINES}
    engine = {name: fields[name] for name in ("cfg_scale", "cuda_graphs", "max_length")}
    if lm.backbone.pattern is not None and isinstance(fields["block_length"], int):
        engine["block_length"] = fields["block_length"]
    decoding = Decoding(lm, sampler, cache, fields["batch_size"], engine, fields["engines"])
    loop = EngineLoop(decoding, fields["queue"], Metrics(fields["batch_size"]))
    options, kinds = offered(lm, cache, fields["cfg_scale"], fields["samplers"])
    own, given = str(chosen["sampler"]), fields["sampler"]
    same = own in options and all(given.get(name) == value for name, value in options_of("sampler", own).items())
    terms = Terms(
        lm=lm,
        name=fields["name"] or PurePath(lm.name).name,
        defaults=defaults,
        seed=fields["seed"],
        max_length=loop.max_length,
        pattern=loop.pattern,
        samplers=options,
        kinds=kinds,
        own=SamplerChoice(own) if same else None,
        most_choices=fields["max_choices"],
        most_open=fields["batch_size"] + fields["queue"],
    )
    limits = Limits(fields["max_body"], fields["io_timeout"], _key(fields["api_key"]))
    return Service(terms, loop, limits, fields["timeout"], Log(fields["log_prompts"]), own, str(chosen["cache"]))


def _key(given: str | None) -> str | None:
    """The key that requests must carry: the option, or the environment variable, without space around it."""
    key = os.environ.get(_KEY, "") if given is None else given
    if not (key.isascii() and key.strip().isprintable()):
        raise ValueError(f"{_KEY} has characters other than printable ASCII; give a key that a header can hold")
    if key and not key.strip():
        raise ValueError(f"{_KEY} is blank; give a key, or leave it out")
    return key.strip() or None


def _check(fields: Mapping[str, Any]) -> None:
    """Reject values out of range before a model is loaded."""
    for name, (low, high) in _COUNTS.items():
        number(name, fields[name], f"a whole number from {low} to {high}", low=low, high=high, whole=True)
    for name, least in _SECONDS.items():
        number(name, fields[name], f"seconds from {least:g} to 1000000", low=least, high=10**6)
    for name in ("host", "api_key", "name"):
        value = fields[name]
        if value is not None and (not value.strip() or not value.isascii() or not value.isprintable()):
            raise ValueError(f"{name}={value!r} is not valid; give printable ASCII characters, or leave it out")
    dllm.Options(**{name: fields[name] for name in dllm.Options.__dataclass_fields__})
