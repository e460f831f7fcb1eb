"""Batch jobs: many prompts in, a folder of parquet shards out, resumable and computed by one process or by Ray."""

from dllm.jobs.decoder import Decoder, Setting, row_seed
from dllm.jobs.engines import JobEngine, Local, Ray
from dllm.jobs.folder import JobFolder
from dllm.jobs.job import Outcome, run
from dllm.jobs.rows import Input, Row, Summary
from dllm.jobs.shard import Result

__all__ = [
    "Decoder",
    "Input",
    "JobEngine",
    "JobFolder",
    "Local",
    "Outcome",
    "Ray",
    "Result",
    "Row",
    "Setting",
    "Summary",
    "row_seed",
    "run",
]
