"""Unmasking policies, one per file. A new one is a module here, a YAML in conf/sampler/ and a test."""

from dllm.samplers.ar_guided import ARGuided
from dllm.samplers.edit import Editing
from dllm.samplers.entropy_threshold import EntropyThreshold
from dllm.samplers.factor import Factor
from dllm.samplers.freedave import FreeDave
from dllm.samplers.learn2pd import Learn2PD
from dllm.samplers.localleap import LocalLeap
from dllm.samplers.oracle import Oracle
from dllm.samplers.sub_blocks import SubBlocks
from dllm.samplers.threshold import Threshold
from dllm.samplers.vanilla import Vanilla

__all__ = [
    "ARGuided",
    "Editing",
    "EntropyThreshold",
    "Factor",
    "FreeDave",
    "Learn2PD",
    "LocalLeap",
    "Oracle",
    "SubBlocks",
    "Threshold",
    "Vanilla",
]
