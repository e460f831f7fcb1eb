"""A causal language model that verifies drafts: `judging` runs it, `alignment` maps tokens between vocabularies."""

from dllm.guide.judging import Guide, Judging, guide_folder, load_guide

__all__ = ["Guide", "Judging", "guide_folder", "load_guide"]
