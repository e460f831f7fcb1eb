"""The denoisers, registered with `AutoConfig`, `AutoModel` and `AutoModelForMaskedLM` under their published types.

A registered type takes precedence over a checkpoint's ``auto_map``, so remote code is never needed.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from dllm.models.base import MaskedDiffusionModel
from dllm.models.dream import DreamConfig, DreamModel
from dllm.models.fastdllm import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from dllm.models.llada import LLaDAConfig, LLaDAModelLM
from dllm.models.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dllm.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from dllm.models.sdar import SDARConfig, SDARForCausalLM
from dllm.models.sdar_moe import SDARMoeConfig, SDARMoeForCausalLM

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "NEWER",
    "DreamConfig",
    "DreamModel",
    "Fast_dLLM_QwenConfig",
    "Fast_dLLM_QwenForCausalLM",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "MaskedDiffusionModel",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARMoeConfig",
    "SDARMoeForCausalLM",
    "family_of",
]

FAMILIES: dict[str, type[MaskedDiffusionModel]] = {
    "llada": LLaDAModelLM,
    "Dream": DreamModel,
    "sdar": SDARForCausalLM,
    "sdar_moe": SDARMoeForCausalLM,
    "llada2_moe": LLaDA2MoeModelLM,
    "Fast_dLLM_Qwen": Fast_dLLM_QwenForCausalLM,
}
for _model_type, _family in FAMILIES.items():
    AutoConfig.register(_model_type, _family.config_class, exist_ok=True)
    AutoModel.register(_family.config_class, _family, exist_ok=True)
    AutoModelForMaskedLM.register(_family.config_class, _family, exist_ok=True)

# Families of transformers' own modules, whose types stay its own, and the first release that has them.
NEWER = {"diffusion_gemma": "5.13"}
with suppress(ImportError):
    from dllm.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    FAMILIES["diffusion_gemma"] = DiffusionGemmaForBlockDiffusion

# By the published name of the class; not every one has a model_type of its own.
ARCHITECTURES: dict[str, type[MaskedDiffusionModel]] = {
    family.__name__: family for family in (*FAMILIES.values(), LLaDAMoEModelLM)
}
_ALIASES = {"llada21_moe": "llada2_moe"}  # of copies of LLaDA2.1


def family_of(config: Mapping[str, Any]) -> type[MaskedDiffusionModel] | None:
    """The family of a `config.json`; where several have its ``model_type``, the architecture decides."""
    model_type = str(config.get("model_type"))
    model_type = _ALIASES.get(model_type, model_type)
    named = [ARCHITECTURES[name] for name in config.get("architectures") or () if name in ARCHITECTURES]
    own = [family for family in named if getattr(family.config_class, "model_type", None) == model_type]
    return own[0] if own else FAMILIES.get(model_type)
