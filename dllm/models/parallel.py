"""Tensor parallelism: every process holds some heads and a part of every feed-forward layer (arXiv 1909.08053).

torchrun starts the processes, and transformers reads into each its part of the weights, by the plan of the family. The
outputs of attention and of the feed-forward part are sums over the processes, and logits are gathered from the parts of
the vocabulary, so that all processes have the same logits bit for bit, and decode the same tokens.
Difference from transformers: once loaded, a layer is an ordinary one with this process's weights, without its hooks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import timedelta
from functools import lru_cache
from itertools import count as counting
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.configuration_utils import DistributedConfig

from dllm.checks import first_line
from dllm.models.checkpoint import expected_tensors
from dllm.models.linear import is_hooked

T = TypeVar("T")
PROJECTION = "colwise_rep"  # of the vocabulary, with the outputs gathered
_joined = counting()  # a store keeps what earlier connections left
_TIMEOUT = timedelta(hours=2)  # a large model is read for minutes, at different speeds


def launched() -> tuple[int, int] | None:
    """Number of this process and their count, as torchrun says; None where it did not start this process."""
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return (int(given[0]), int(given[1])) if all(map(str.isdigit, given)) else None


def store(purpose: str) -> Any:
    """A key-value store of the processes, which torchrun hosts."""
    from torch.distributed.distributed_c10d import PrefixStore  # not part of every torch

    return PrefixStore(purpose, _shared_store())


@lru_cache(maxsize=1)
def _shared_store() -> Any:
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://"))[0]


def check_options(device: Any, device_map: Any, pack: Any, adapter: Any, quantization: Any) -> None:
    """Reject options of `load` without effect or support beside tp=true.

    Raises:
        ValueError: there is such an option, or torchrun did not start this process.
    """
    if device_map is not None:
        raise ValueError(f"device_map={device_map!r} has no effect with tp=true; leave it out")
    if pack is True:
        raise ValueError("pack=true does not support weights divided by tp=true; use pack=false")
    if adapter is not None:
        raise ValueError(f"adapter={str(adapter)!r} cannot be merged into weights divided by tp=true; use tp=false")
    if quantization is not None:
        raise ValueError("quantization is not supported with tp=true; leave one of them out")
    own = _device().type
    if device is not None and str(device) != own:
        raise ValueError(f"device={str(device)!r} is not supported with tp=true, which uses {own} here; leave it out")
    if launched() is None and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "tp=true divides the model over processes that torchrun starts; use torchrun --nproc-per-node 2 ..., or "
            "tp=false"
        )


def plan_head(backbone: Any) -> None:
    """Add the projection to the vocabulary to a model's plan, where it has weights of its own that divide evenly."""
    head = backbone.get_output_embeddings()
    if not dist.is_available() or not dist.is_initialized() or not backbone._tp_plan or head is None:
        return
    if not backbone.config.tie_word_embeddings and head.out_features % dist.get_world_size() == 0:
        name = next(name for name, module in backbone.named_modules() if module is head)
        backbone._tp_plan[name] = PROJECTION


def check_family(family: Any, config: Any, count: int) -> None:
    """Reject a model that cannot be divided over this many processes.

    Raises:
        ValueError: its family has no plan, or a part does not divide evenly.
    """
    plan = getattr(config, "base_model_tp_plan", None)
    if family.uniform or not plan:
        raise ValueError(f"tp=true does not support {family.__name__}, which has no plan for it; use device_map=auto")
    heads = {"num_attention_heads": "attention heads", "num_key_value_heads": "key-value heads"}
    if divides_heads(plan):
        for name, what in heads.items():
            _check_even(getattr(config, name), what, count)
    for name, shape in expected_tensors(family, config):
        style = plan_of(plan, name.rpartition(".")[0])
        if style is not None:
            _check_even(shape[0 if style == "colwise" else -1], f"rows or columns of {name}", count)


def _check_even(size: int, what: str, count: int) -> None:
    if size % count:
        raise ValueError(
            f"tp=true cannot divide {size} {what} over {count} processes; use a number of processes that divides {size}"
        )


def join() -> int:
    """Connect the processes, if they are not yet; their count.

    Raises:
        ValueError: there are fewer devices than processes, or the processes cannot be connected.
    """
    if not dist.is_initialized():
        device, place = _device().type, int(os.environ.get("LOCAL_RANK", "0"))
        if device == "cuda":
            if place >= torch.cuda.device_count():
                raise ValueError(
                    f"tp=true needs a GPU for every process, and there are {torch.cuda.device_count()}; use "
                    f"--nproc-per-node {torch.cuda.device_count()}"
                )
            torch.cuda.set_device(place)
        try:
            own, count = launched() or (0, 1)
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=store(f"models {next(_joined)}"), rank=own, world_size=count, timeout=_TIMEOUT
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"tp=true cannot connect the processes ({first_line(error)}); use torchrun") from None
    return dist.get_world_size()


def leave() -> None:
    """Disconnect the processes, all of which do so."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def together(work: Callable[[], T]) -> T:
    """Do something in every process, which fails everywhere where it fails in one."""
    result, error = None, None
    try:
        result = work()
    except Exception as found:  # noqa: BLE001  # raised again below
        error = found
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for number, reason in enumerate(said):
        if reason is not None:
            raise ValueError(f"process {number}: {reason}")
    return result  # type: ignore[return-value]  # there was no error


def arguments(count: int) -> dict[str, Any]:
    """What divides a model in `from_pretrained`."""
    if count == 1:
        return {"device_map": {"": _device()}}
    if "tp_plan" in {field.name for field in fields(DistributedConfig)}:
        return {"distributed_config": DistributedConfig(tp_size=count, tp_plan="auto")}
    return {"tp_plan": "auto"}  # before transformers 5.16


def divides_heads(plan: Mapping[str, str]) -> bool:
    """Whether a plan divides attention by heads."""
    return any(name.endswith(".k_proj") for name in plan)


def plan_of(plan: Mapping[str, str], name: str) -> str | None:
    """How a plan divides a module; None where it does not."""
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def localise(backbone: Any) -> None:
    """Make a divided model's layers ordinary ones with this process's weights; sum and gather their outputs."""
    backbone.requires_grad_(False)
    if divides_heads(backbone._tp_plan):
        backbone.head_shares = dist.get_world_size()
    backbone.refuses = {**backbone.refuses, "graphs": "its processes exchange parts of every layer (tp=true)"}
    head = backbone.get_output_embeddings()
    for name, layer in backbone.named_modules():
        style = plan_of(backbone._tp_plan, name)
        if style is None:
            continue
        vars(layer).pop("forward", None)
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
        for own, weight in list(layer.named_parameters(recurse=False)):
            local = weight.data.to_local() if hasattr(weight.data, "to_local") else weight.data
            setattr(layer, own, nn.Parameter(local.contiguous(), requires_grad=False))
        layer.out_features, layer.in_features = layer.weight.shape
        if style == "rowwise":
            layer.register_forward_hook(_sum)
        elif style == PROJECTION:
            layer.register_forward_hook(_gather)
    if not is_hooked(head):
        head.register_forward_hook(_same)


def gather(part: Tensor, dim: int) -> Tensor:
    """The parts of all processes, one after the other along a dimension."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts, dim=dim)


def _sum(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    dist.all_reduce(output)
    return output


def _gather(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return gather(output, -1)


def _same(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    output = output.contiguous()
    dist.broadcast(output, 0)
    return output


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
