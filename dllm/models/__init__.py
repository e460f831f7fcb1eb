"""The denoisers, registered with `AutoConfig`, `AutoModel` and `AutoModelForMaskedLM` under their published types.

A registered type takes precedence over a checkpoint's ``auto_map``, so remote code is never needed.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from dllm.models.base import MaskedDiffusionModel
from dllm.models.dream import DreamConfig, DreamModel
from dllm.models.llada import LLaDAConfig, LLaDAModelLM
from dllm.models.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dllm.models.sdar import SDARConfig, SDARForCausalLM

__all__ = [
    "FAMILIES",
    "DreamConfig",
    "DreamModel",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAModelLM",
    "MaskedDiffusionModel",
    "SDARConfig",
    "SDARForCausalLM",
    "family_of",
]

FAMILIES: dict[str, type[MaskedDiffusionModel]] = {
    "llada": LLaDAModelLM,
    "Dream": DreamModel,
    "sdar": SDARForCausalLM,
    "llada2_moe": LLaDA2MoeModelLM,
}
_ARCHITECTURES = {family.__name__: family for family in FAMILIES.values()}

for _model_type, _family in FAMILIES.items():
    AutoConfig.register(_model_type, _family.config_class, exist_ok=True)
    AutoModel.register(_family.config_class, _family, exist_ok=True)
    AutoModelForMaskedLM.register(_family.config_class, _family, exist_ok=True)


def family_of(config: Mapping[str, Any]) -> type[MaskedDiffusionModel] | None:
    """The family of a `config.json`: that of its architecture, which tells apart families of one ``model_type``."""
    named = [_ARCHITECTURES[name] for name in config.get("architectures") or () if name in _ARCHITECTURES]
    return named[0] if named else FAMILIES.get(str(config.get("model_type")))
