"""The processes after the first in a command with tensor parallelism: they repeat its calls (`dllm.models.leading`)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from dllm.decoding.engine import Engine
from dllm.models import leading, parallel
from dllm.models.loading import LanguageModel, load


def follow() -> None:
    """Repeat the calls of the first process until it ends."""
    models: dict[int, LanguageModel] = {}
    engines: dict[int, Engine] = {}
    for name, number, *arguments in leading.told():
        match name:
            case "load":
                with suppress(ValueError):  # which the first process reports
                    models[number] = load(**arguments[0])
            case "forget":
                models.pop(number, None)
            case "forward":
                _forward(models[number], arguments[0])
            case "engine":
                model, options = arguments
                engines[number] = Engine(models[model], **options)
            case "submit":
                request, has_tokenizer = arguments
                engine = engines[number]
                engine.submit(replace(request, tokenizer=engine.lm.tokenizer if has_tokenizer else None))
            case "abort":
                engines[number].abort(*arguments)
            case "step":
                engines[number].step()
            case "close":
                engines.pop(number).close()
    parallel.leave()


@torch.inference_mode()
def _forward(lm: LanguageModel, inputs: dict[str, Any]) -> None:
    lm.backbone(**{name: each.to(lm.device) for name, each in inputs.items()})
