"""Caches, one per file. A new one is a module here, a YAML in conf/cache/ and a test."""

from dllm.cache.block import Block
from dllm.cache.d2cache import D2Cache
from dllm.cache.dkv import DKVCache
from dllm.cache.dllm_cache import DLLMCache
from dllm.cache.dual import Dual
from dllm.cache.elastic import Elastic
from dllm.cache.freecache import FreeCache
from dllm.cache.none import NoCache
from dllm.cache.prefix import Prefix
from dllm.cache.sparse import Sparse
from dllm.cache.sub_blocks import SubBlocks

__all__ = [
    "Block",
    "D2Cache",
    "DKVCache",
    "DLLMCache",
    "Dual",
    "Elastic",
    "FreeCache",
    "NoCache",
    "Prefix",
    "Sparse",
    "SubBlocks",
]
