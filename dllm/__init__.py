"""dllm: any unmasking policy, with any cache, for any diffusion language model.

Glossary of shapes, used everywhere: B batch, L canvas, P prompt, G generated, K block, C computed
columns, S columns attended to, N requested positions, D drafts (or head dimension in the backbone),
V vocabulary, H heads. A column is an index into the left-padded canvas, a position one into a row's text.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllm import cache, samplers
    from dllm.api import as_completed, generate, infill, load, stream
    from dllm.decoding.engine import Engine
    from dllm.decoding.options import Options
    from dllm.decoding.result import Generation, Stats
    from dllm.decoding.step import Answer, Event, Frame, Step
    from dllm.models.loading import LanguageModel
    from dllm.resolve import register

__all__ = [
    "Answer",
    "Engine",
    "Event",
    "Frame",
    "Generation",
    "LanguageModel",
    "Options",
    "Stats",
    "Step",
    "as_completed",
    "cache",
    "generate",
    "infill",
    "load",
    "register",
    "samplers",
    "stream",
]
_MODULES = {
    "Answer": "decoding.step", "Engine": "decoding.engine", "Event": "decoding.step", "Frame": "decoding.step",
    "Generation": "decoding.result", "LanguageModel": "models.loading", "Options": "decoding.options",
    "Stats": "decoding.result", "Step": "decoding.step", "as_completed": "api", "generate": "api", "infill": "api",
    "load": "api", "register": "resolve", "stream": "api",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first access: importing torch takes seconds, during which a command must end on Ctrl-C."""
    if name.startswith("_"):
        raise AttributeError(f"module 'dllm' has no attribute {name!r}")
    if name in _MODULES:
        globals()[name] = found = getattr(import_module(f"dllm.{_MODULES[name]}"), name)
        return found
    try:
        return import_module(f"dllm.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"dllm.{name}":
            raise
        raise AttributeError(f"module 'dllm' has no attribute {name!r}") from None
