"""Caches, one per file. A new one is a module here, a YAML in conf/cache/ and a test."""

from dllm.cache.d2cache import D2Cache
from dllm.cache.dkv import DKVCache
from dllm.cache.dllm_cache import DLLMCache
from dllm.cache.dual import Dual
from dllm.cache.freecache import FreeCache
from dllm.cache.none import NoCache
from dllm.cache.prefix import Prefix

__all__ = ["D2Cache", "DKVCache", "DLLMCache", "Dual", "FreeCache", "NoCache", "Prefix"]
