"""Unmasking policies, one per file. A new one is a module here, a YAML in conf/sampler/ and a test."""

from dllm.samplers.adablock import AdaBlock
from dllm.samplers.ar_guided import ARGuided
from dllm.samplers.daedal import Daedal
from dllm.samplers.entropy_threshold import EntropyThreshold
from dllm.samplers.factor import Factor
from dllm.samplers.freedave import FreeDave
from dllm.samplers.learn2pd import Learn2PD
from dllm.samplers.localleap import LocalLeap
from dllm.samplers.lopa import LoPA
from dllm.samplers.multiblock import MultiBlock
from dllm.samplers.oracle import Oracle
from dllm.samplers.remdm import ReMDM
from dllm.samplers.t2m import T2M
from dllm.samplers.threshold import Threshold
from dllm.samplers.vanilla import Vanilla
from dllm.samplers.wino import Wino

__all__ = [
    "T2M",
    "ARGuided",
    "AdaBlock",
    "Daedal",
    "EntropyThreshold",
    "Factor",
    "FreeDave",
    "Learn2PD",
    "LoPA",
    "LocalLeap",
    "MultiBlock",
    "Oracle",
    "ReMDM",
    "Threshold",
    "Vanilla",
    "Wino",
]
