"""Translation of arguments of other model classes of the harness to those of this one.

Values that mean "off" in transformers or vLLM mean off. Arguments without effect give a warning; unknown ones that
would change the results are left for the caller to reject.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

GEN_LENGTH = 256  # default if neither the user nor the task sets it
BATCH_SIZE = 8
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "max_length")
_STOPS = ("until", "stop", "stop_strings", "stop_sequences")
_KNOWN = {"do_sample", "temperature", "top_p", "top_k", *_LENGTHS, *_STOPS}
_DTYPES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
# Affect speed or placement, not results.
_ELSEWHERE = """add_bos_token backend data_parallel_size gpu_memory_utilization logits_cache low_cpu_mem_usage
max_cpu_memory max_memory_per_gpu offload_folder softmax_dtype swap_space tensor_parallel_size truncation
use_fast_tokenizer""".split()
# Would change the results, unless off.
_OTHERS = """autogptq chat_template delta enable_thinking gguf_file gptqmodel load_in_4bit load_in_8bit max_length
max_model_len peft prefix_token_id quantization subfolder think_end_token tokenizer""".split()
Tell = Callable[[str], None]


def model_arguments(given: Mapping[str, Any], beside: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Translate model arguments.

    Args:
        given: of `--model_args`.
        beside: separate options of the command line: batch_size, max_batch_size and device; `given` has precedence.
        tell: called with warnings.

    Raises:
        ValueError: an invalid batch size.
    """
    more = {name: value for name, value in beside.items() if value is not None}
    if more.get("device") == "cuda:0" and "device" not in given and not torch.cuda.is_available():
        del more["device"]
        tell("device='cuda:0' is not available here; the CPU is used")
    known = more | {name: None if value == "null" else value for name, value in given.items()}
    if flag("trust_remote_code", known.pop("trust_remote_code", False)):
        tell("trust_remote_code has no effect: code of a checkpoint is never run")
    if flag("parallelize", known.pop("parallelize", False)):
        if torch.cuda.device_count() > 1:
            known.pop("device", None)
            known.setdefault("device_map", "auto")
        else:
            tell("parallelize has no effect with fewer than two GPUs")
    known["batch_size"] = _batch_size(known.pop("batch_size", None), known.pop("max_batch_size", None), tell)
    if "torch_dtype" in known:
        known["dtype"] = known.pop("torch_dtype")
    if "dtype" in known:
        name = "auto" if _off(known["dtype"]) else str(known["dtype"]).removeprefix("torch.")
        known["dtype"] = _DTYPES.get(name, name)
    for name in _OTHERS:
        if name in known and (_off(known[name]) or known[name] is False):
            del known[name]
    for name in [name for name in _ELSEWHERE if name in known]:
        if not _off(known.pop(name)):
            tell(f"{name} has no effect here")
    if "temperature" in known:
        known["temperature"] = _number("temperature", known["temperature"]) or 0.0
    return known | {name: limit(known[name]) for name, limit in _LIMITS.items() if name in known}


def generation(asked: Mapping[str, Any], prompt: int, tell: Tell) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Translate the generation options of a request.

    Args:
        asked: from the task or `--gen_kwargs`.
        prompt: length of the prompt, which max_length includes.
        tell: called with warnings.

    Returns:
        Options, and stop strings.

    Raises:
        ValueError: a value of the wrong type.
    """
    asked = {name: value for name, value in asked.items() if not _off(value)}
    if unknown := set(asked) - _KNOWN:
        tell(f"generation options {', '.join(sorted(unknown))} have no effect here")
    temperature = _number("temperature", asked.get("temperature"))
    sampled = flag("do_sample", asked["do_sample"]) if "do_sample" in asked else bool(temperature)
    options: dict[str, Any] = {
        "gen_length": _length(asked, prompt, tell),
        # transformers samples at temperature 1 if only do_sample is given.
        "temperature": (1.0 if temperature is None else max(temperature, 0.0)) if sampled else 0.0,
        **{name: limit(asked.get(name)) for name, limit in _LIMITS.items()},
    }
    if options["temperature"] == 0:
        idle = [name for name in _LIMITS if options[name] is not None]
        for name in ["temperature"] * bool(temperature) + idle:
            options[name] = 0.0 if name == "temperature" else None
            tell(f"{name}={asked[name]} has no effect: without do_sample=true and a temperature decoding is greedy")
    stops = [asked.get(name, ()) for name in _STOPS]
    texts = [text for each in stops for text in (each if isinstance(each, (list, tuple)) else (each,))]
    if wrong := [text for text in texts if not _off(text) and not isinstance(text, str)]:
        raise ValueError(f"until={wrong[0]!r} is of the wrong type; give strings")
    return options, tuple(dict.fromkeys(text for text in texts if text))


def asks(asked: Mapping[str, Any], option: str) -> bool:
    """Whether the generation options of a request set an option of `generation`."""
    names = _LENGTHS if option == "gen_length" else (option,)
    return any(not _off(asked.get(name)) for name in names)


def _length(asked: Mapping[str, Any], prompt: int, tell: Tell) -> int:
    """The length asked for; of several, the last one, as `--gen_kwargs` comes after the task."""
    given = [name for name in asked if name in _LENGTHS]
    if not given:
        return GEN_LENGTH
    name = given[-1]
    if others := [each for each in given[:-1] if asked[each] != asked[name]]:
        tell(f"{name}={asked[name]} is used, not {others[-1]}={asked[others[-1]]}, which is given as well")
    length = _count(name, asked[name]) or 0
    if name == "max_length":
        return max(1, length - prompt)
    if length < 1:
        raise ValueError(f"{name}={asked[name]!r} is out of range; use 1 or more")
    return length


def _batch_size(value: Any, most: Any, tell: Tell) -> int:
    """Batch size; "auto" or "auto:N" give the default, at most `most`."""
    text = "" if _off(value) else str(value)
    if text.partition(":")[0] == "auto":
        size = min(BATCH_SIZE, _count("max_batch_size", most) or BATCH_SIZE)
        tell(f"batch_size={text!r} is not searched for; {size} rows are decoded together")
        return size
    if text and not (text.isascii() and text.isdecimal()):
        raise ValueError(f"unknown batch_size={value!r}; expected a whole number or auto")
    return int(text or BATCH_SIZE)


def _off(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.lower() in ("", "none", "null"))


def flag(name: str, value: Any) -> bool:
    """A boolean, possibly as text.

    Raises:
        ValueError: it is none.
    """
    text = "false" if _off(value) else str(value).lower()
    if text not in ("true", "false", "1", "0"):
        raise ValueError(f"{name}={value!r} is not true or false; give one of them")
    return text in ("true", "1")


def _number(name: str, value: Any) -> float | None:
    """A number, possibly as text; None if off."""
    if _off(value):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r} is not a number; give one, or null") from None


def _count(name: str, value: Any) -> int | None:
    """A whole number, possibly as text; None if off."""
    found = _number(name, value)
    if found is not None and not found.is_integer():  # nor are infinity and NaN
        raise ValueError(f"{name}={value!r} is not a whole number; give one, or null")
    return None if found is None else int(found)


def _top_p(value: Any) -> float | None:
    share = _number("top_p", value)
    return None if share is None or share >= 1 else share


def _top_k(value: Any) -> int | None:
    count = _count("top_k", value)
    return None if count is None or count <= 0 else count


_LIMITS: dict[str, Callable[[Any], Any]] = {"top_p": _top_p, "top_k": _top_k}
