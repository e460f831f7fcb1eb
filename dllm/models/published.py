"""Validation of the keys of a config.json about the computation and the special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from dllm.checks import number

# Keys of other models that change results without changing weights, with their neutral values.
_ELSEWHERE = {
    "hidden_act": "silu", "activation_type": "silu", "clip_qkv": None, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "query_pre_attn_scalar": None, "attention_multiplier": None,
    "embedding_multiplier": 1, "residual_multiplier": 1, "logits_scaling": 1, "logit_scale": 1, "scale_emb": 1,
    "embedding_layer_norm": False, "norm_after": False, "no_rope_layers": None, "rotary_pct": 1,
    "use_sliding_window": False, "use_mrope": False, "input_emb_norm": False, "scale_logits": False, "alibi": False,
}  # fmt: skip
# Names of the same size in the families and elsewhere.
_SYNONYMS = (
    ("n_heads", "num_attention_heads", "num_heads", "n_head"),
    ("n_kv_heads", "num_key_value_heads", "num_kv_heads"),
    ("n_layers", "num_hidden_layers", "num_layers", "n_layer"),
    ("d_model", "hidden_size", "n_embd"),
    ("mlp_hidden_size", "intermediate_size", "ffn_dim"),
    ("max_sequence_length", "max_position_embeddings", "n_positions", "n_ctx"),
)  # fmt: skip


def check_synonyms(kind: str, config: Any, given: Mapping[str, Any]) -> None:
    """Reject a size under an unread synonym that differs from the value in use.

    Raises:
        ValueError: an entry differs.
    """
    for names in _SYNONYMS:
        own = next((name for name in names if name in vars(config)), None)
        for name in names:
            if own is not None and name != own and given.get(name) not in (None, used := getattr(config, own)):
                raise ValueError(f"{kind} config: {name}={given[name]!r} is not read, and {own} is {used}; use {own}")
    if given.get("head_dim") not in (None, size := config.hidden_size // config.num_attention_heads):
        raise ValueError(f"{kind} config: head_dim={given['head_dim']!r} is not read, and heads have {size}; remove it")


def check_fixed(kind: str, fixed: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Reject unsupported values of keys that the published models fix; null means false.

    Raises:
        ValueError: an entry of `fixed`, or a key of other models, has an unsupported value; layers differ.
    """
    for key, value in {**_ELSEWHERE, **fixed}.items():
        if (given.get(key, value) or None) != (value or None):
            raise ValueError(
                f"{kind} config: {key}={given[key]!r} is not supported; the published models have {value!r}"
            )
    layers = given.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(each != "full_attention" for each in layers)):
        raise ValueError(f"{kind} config: layer_types={layers!r} is not supported; use full_attention in every layer")


def take_rope_theta(kind: str, default: float, given: dict[str, Any]) -> Any:
    """Pop the base of the rotary embedding, in the published layout or in that of transformers 5.

    Published: ``rope_theta`` beside a ``rope_scaling`` of null. transformers 5: one ``rope_parameters`` of type
    "default" with the base in it.

    Args:
        kind: of the model, for errors.
        default: if nothing is given.
        given: entries of the config; those of the rotary embedding are removed.

    Raises:
        ValueError: scaled or partial rotary embedding, or inconsistent entries.
    """
    entries = {"rope_theta": given.pop("rope_theta")} if "rope_theta" in given else {}
    for key in ("rope_parameters", "rope_scaling"):
        parameters = given.pop(key, None)
        if parameters is None:
            continue
        if not isinstance(parameters, dict) or not _is_plain(parameters):
            raise ValueError(
                f"{kind} config: {key}={parameters!r} is not supported; use an unscaled rotary embedding: null, or "
                "rope_type 'default' with a rope_theta"
            )
        if parameters.get("rope_theta") is not None:
            entries[f"{key}.rope_theta"] = parameters["rope_theta"]
    share = given.pop("partial_rotary_factor", None)
    if share is not None and (isinstance(share, bool) or share != 1):
        raise ValueError(f"{kind} config: partial_rotary_factor={share!r} is not supported; use null")
    for name, theta in entries.items():
        if not is_positive(theta):
            raise ValueError(f"{kind} config: {name}={theta!r} is out of range; give a positive number")
    (first, theta), *others = list(entries.items()) or [("rope_theta", default)]
    for name, other in others:
        if other != theta:
            raise ValueError(f"{kind} config: {first}={theta!r} and {name}={other!r} disagree; keep the right one")
    return theta


def take_rotary_share(kind: str, default: float, given: dict[str, Any]) -> Any:
    """Pop the share of a head that has rotary embedding, in either layout of `take_rope_theta`, which comes after.

    Args:
        kind: of the model, for errors.
        default: if nothing is given.
        given: entries of the config; those of the share are removed.

    Raises:
        ValueError: a share out of range, or inconsistent entries.
    """
    entries = {"partial_rotary_factor": given.pop("partial_rotary_factor", None)}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(given.get(key), dict):
            given[key] = dict(given[key])
            entries[f"{key}.partial_rotary_factor"] = given[key].pop("partial_rotary_factor", None)
    found = {name: share for name, share in entries.items() if share is not None}
    for name, share in found.items():
        number(f"{kind} config: {name}", share, "a number above 0 and at most 1", above=0, high=1)
        if share != next(iter(found.values())):
            raise ValueError(f"{kind} config: {next(iter(found))} and {name}={share!r} disagree; keep the right one")
    return next(iter(found.values()), default)


def _is_plain(parameters: dict[str, Any]) -> bool:
    types = [parameters[key] for key in ("rope_type", "type") if parameters.get(key) is not None]
    share = parameters.get("partial_rotary_factor")
    whole = share is None or (share == 1 and not isinstance(share, bool))
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    return (
        whole
        and all(one == "default" for one in types)
        and all(key in known or value is None for key, value in parameters.items())
    )


def check_special_ids(kind: str, mask_token_id: Any, eos_token_id: Any) -> None:
    """Reject values that are not token ids; whether the model has the id is checked when it is loaded.

    Raises:
        ValueError: an invalid mask id or end-of-text id.
    """
    if not is_whole(mask_token_id):
        raise ValueError(f"{kind} config: mask_token_id={mask_token_id!r} is not a token id; give the id of [MASK]")
    listed = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    if eos_token_id is not None and not all(map(is_whole, listed)):
        raise ValueError(
            f"{kind} config: eos_token_id={eos_token_id!r} is not a token id; give the id that ends a text, or a list "
            "of them"
        )


def is_whole(value: Any) -> bool:
    """Whether this is an integer, not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """Whether this is a finite positive number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and isfinite(value)
