"""The denoisers, registered with `AutoConfig`, `AutoModel` and `AutoModelForMaskedLM` under their published types.

A registered type takes precedence over a checkpoint's ``auto_map``, so remote code is never needed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from dllm.models.base import MaskedDiffusionModel
from dllm.models.dream import DreamConfig, DreamModel
from dllm.models.llada import LLaDAConfig, LLaDAModelLM
from dllm.models.sdar import SDARConfig, SDARForCausalLM

__all__ = [
    "FAMILIES",
    "DreamConfig",
    "DreamModel",
    "LLaDAConfig",
    "LLaDAModelLM",
    "MaskedDiffusionModel",
    "SDARConfig",
    "SDARForCausalLM",
]

FAMILIES: dict[str, type[MaskedDiffusionModel]] = {
    "llada": LLaDAModelLM,
    "Dream": DreamModel,
    "sdar": SDARForCausalLM,
}

for _model_type, _family in FAMILIES.items():
    AutoConfig.register(_model_type, _family.config_class, exist_ok=True)
    AutoModel.register(_family.config_class, _family, exist_ok=True)
    AutoModelForMaskedLM.register(_family.config_class, _family, exist_ok=True)
