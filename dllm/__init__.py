"""dllm: any unmasking policy, with any cache, over any diffusion language model.

Glossary of shapes, used everywhere: B batch, L canvas, P prompt, G generated, K block, C computed
columns, S columns attended to, N asked positions, D drafts (or head dimension in the backbone),
V vocabulary, H heads.
"""

from dllm import cache, samplers
from dllm.api import Frame, as_completed, generate, infill, stream
from dllm.generation import Generation, Stats
from dllm.loading import LanguageModel, load
from dllm.plan import Answer, Options

__all__ = [
    "Answer",
    "Frame",
    "Generation",
    "LanguageModel",
    "Options",
    "Stats",
    "as_completed",
    "cache",
    "generate",
    "infill",
    "load",
    "samplers",
    "stream",
]
