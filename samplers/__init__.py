"""Unmasking policies, one a file. Adding one is a module here, a YAML in conf/sampler/ and a test."""

from dllm.samplers.entropy_threshold import EntropyThreshold
from dllm.samplers.factor import Factor
from dllm.samplers.threshold import Threshold
from dllm.samplers.vanilla import Vanilla

__all__ = ["EntropyThreshold", "Factor", "Threshold", "Vanilla"]
