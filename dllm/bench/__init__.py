"""Time of a denoising step, relative to its bare forward pass and to reference implementations."""

from dllm.bench.cost import Cost
from dllm.bench.models import PRESETS, random_model
from dllm.bench.policy import CommitsPerStep
from dllm.bench.timing import Bench

__all__ = ["PRESETS", "Bench", "CommitsPerStep", "Cost", "random_model"]
