"""A causal language model that guides a denoiser: `judging` runs it, `alignment` maps tokens between the two."""

from dllm.guide.judging import Guide, Judging, guide_folder, load_guide

__all__ = ["Guide", "Judging", "guide_folder", "load_guide"]
