"""Caches, one a file. Adding one is a module here, a YAML in conf/cache/ and a test."""

from dllm.cache.none import NoCache

__all__ = ["NoCache"]
