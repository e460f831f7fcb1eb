"""Unmasking policies, one per file. A new one is a module here, a YAML in conf/sampler/ and a test."""

from dllm.samplers.adablock import AdaBlock
from dllm.samplers.anchored import Anchored
from dllm.samplers.ar_guided import ARGuided
from dllm.samplers.calibrated import Calibrated
from dllm.samplers.certainty import Certainty
from dllm.samplers.credit import Credit
from dllm.samplers.daedal import Daedal
from dllm.samplers.eb import EB
from dllm.samplers.edit import Editing
from dllm.samplers.entropy_threshold import EntropyThreshold
from dllm.samplers.factor import Factor
from dllm.samplers.freedave import FreeDave
from dllm.samplers.hierarchical import Hierarchical
from dllm.samplers.klass import KLASS
from dllm.samplers.learn2pd import Learn2PD
from dllm.samplers.localleap import LocalLeap
from dllm.samplers.lopa import LoPA
from dllm.samplers.multiblock import MultiBlock
from dllm.samplers.oracle import Oracle
from dllm.samplers.pc import PC
from dllm.samplers.prophet import Prophet
from dllm.samplers.remdm import ReMDM
from dllm.samplers.renoise import Renoise
from dllm.samplers.s2d2 import S2D2
from dllm.samplers.saber import Saber
from dllm.samplers.slowfast import SlowFast
from dllm.samplers.ssd import SSD
from dllm.samplers.sub_blocks import SubBlocks
from dllm.samplers.t2m import T2M
from dllm.samplers.threshold import Threshold
from dllm.samplers.vanilla import Vanilla
from dllm.samplers.wino import Wino

__all__ = [
    "EB",
    "KLASS",
    "PC",
    "S2D2",
    "SSD",
    "T2M",
    "ARGuided",
    "AdaBlock",
    "Anchored",
    "Calibrated",
    "Certainty",
    "Credit",
    "Daedal",
    "Editing",
    "EntropyThreshold",
    "Factor",
    "FreeDave",
    "Hierarchical",
    "Learn2PD",
    "LoPA",
    "LocalLeap",
    "MultiBlock",
    "Oracle",
    "Prophet",
    "ReMDM",
    "Renoise",
    "Saber",
    "SlowFast",
    "SubBlocks",
    "Threshold",
    "Vanilla",
    "Wino",
]
