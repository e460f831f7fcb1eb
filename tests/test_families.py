"""Families of block-diffusion models and of mixtures of experts: what their configs may say, and how they are told."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dllm
from commands import command
from dllm.checks import Notice
from dllm.models import (
    ARCHITECTURES,
    Fast_dLLM_QwenConfig,
    LLaDA2MoeConfig,
    LLaDAMoEConfig,
    SDARMoeConfig,
    family_of,
)
from dllm.models.experts import Experts, GatedMLP
from dllm.models.transformer import RMSNorm
from dllm.tasks.tokenizer import build_tokenizer
from models import (
    random_dream,
    random_fast_dllm,
    random_llada,
    random_llada2,
    random_llada_moe,
    random_sdar,
    random_sdar_moe,
    save_folder,
)

Maker = Callable[..., dllm.LanguageModel]
MAKERS: dict[str, Maker] = {
    "llada2": random_llada2, "fast_dllm": random_fast_dllm, "sdar_moe": random_sdar_moe, "llada_moe": random_llada_moe
}  # fmt: skip
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (LLaDA2MoeConfig, {"score_function": "softmax"}, "score_function='softmax' is not supported"),
    (LLaDA2MoeConfig, {"use_qkv_bias": True}, "use_qkv_bias=True is not supported"),
    (LLaDA2MoeConfig, {"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
    (LLaDA2MoeConfig, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "use an unscaled rotary embedding"),
    (LLaDA2MoeConfig, {"n_group": 7}, "num_experts=256 is not divisible by n_group=7"),
    (LLaDA2MoeConfig, {"topk_group": 9}, "topk_group=9 is out of range; use a whole number from 1 to n_group=8"),
    (LLaDA2MoeConfig, {"topk_group": 1, "num_experts_per_tok": 33}, "more than topk_group=1 groups hold"),
    (LLaDA2MoeConfig, {"num_experts": 10**6}, "num_experts=1000000 is out of range"),
    (LLaDA2MoeConfig, {"num_experts_per_tok": 0}, "num_experts_per_tok=0 is out of range"),
    (LLaDA2MoeConfig, {"moe_intermediate_size": 2**30}, "moe_intermediate_size=1073741824 is out of range"),
    (LLaDA2MoeConfig, {"num_shared_experts": -1}, "num_shared_experts=-1 is out of range"),
    (LLaDA2MoeConfig, {"first_k_dense_replace": "one"}, "first_k_dense_replace='one' is out of range"),
    (LLaDA2MoeConfig, {"routed_scaling_factor": 0}, "routed_scaling_factor=0 is out of range"),
    (LLaDA2MoeConfig, {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 is out of range"),
    (LLaDA2MoeConfig, {"partial_rotary_factor": 0.01}, "rotates 1 dimensions of a head"),
    (LLaDA2MoeConfig, {"rope_parameters": {"partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.5}, "disagree"),
    (LLaDA2MoeConfig, {"block_size": 0}, "block_size=0 is out of range"),
    (LLaDA2MoeConfig, {"mask_token_id": "x"}, "mask_token_id='x' is not a token id"),
    (Fast_dLLM_QwenConfig, {"bd_size": 0}, "bd_size=0 is out of range"),
    (Fast_dLLM_QwenConfig, {"layer_types": ["sliding_attention"] * 28}, "use full_attention in every layer"),
    (Fast_dLLM_QwenConfig, {"tie_word_embeddings": "yes"}, "unknown Fast-dLLM config: tie_word_embeddings='yes'"),
    (SDARMoeConfig, {"attention_bias": True}, "attention_bias=True is not supported"),
    (SDARMoeConfig, {"decoder_sparse_step": 0}, "decoder_sparse_step=0 is out of range"),
    (SDARMoeConfig, {"mlp_only_layers": 3}, "mlp_only_layers=3 is not a list of numbers"),
    (SDARMoeConfig, {"norm_topk_prob": 2}, "norm_topk_prob=2"),
    (LLaDAMoEConfig, {"moe_layer_freq": [0, *[1] * 15]}, "experts in every layer"),
    (LLaDAMoEConfig, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64 is not supported"),
    (LLaDAMoEConfig, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    (LLaDAMoEConfig, {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True is not supported"),
]


@pytest.mark.parametrize(("config", "entries", "message"), REFUSED, ids=[f"{c.__name__}-{e}" for c, e, _ in REFUSED])
def test_a_config_that_is_not_supported_is_refused_in_one_line(
    config: Any, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is checked below
        config(**entries)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@makers
def test_a_saved_model_loads_as_its_family_with_the_same_config(make: Maker, tmp_path: Path) -> None:
    lm = make(dtype=torch.float32)
    folder = save_folder(lm, tmp_path)
    loaded = dllm.load(folder, device="cpu")
    assert type(loaded.backbone) is type(lm.backbone)
    kept = {
        name: value
        for name, value in lm.backbone.config.to_dict().items()
        if name not in ("_name_or_path", "architectures", "dtype")
    }
    assert {name: loaded.backbone.config.to_dict()[name] for name in kept} == kept
    tokens = torch.arange(30)[None]
    assert torch.equal(loaded.backbone(tokens).logits, lm.backbone(tokens).logits)
    out = dllm.generate(loaded, [[5, 9, 3]], "threshold", gen_length=9)
    assert not (out.completions == lm.backbone.mask_token_id).any()


def test_an_architecture_decides_between_families_of_one_model_type() -> None:
    assert {name: family.__name__ for name, family in ARCHITECTURES.items()} == {name: name for name in ARCHITECTURES}
    for name, config in (
        ("LLaDAMoEModelLM", {"model_type": "llada"}),
        ("LLaDA2MoeModelLM", {"model_type": "llada21_moe"}),
    ):
        found = family_of(config | {"architectures": [name]})
        assert found is not None and found.__name__ == name
    assert family_of({"model_type": "llada"}) is family_of({"model_type": "llada", "architectures": ["Unknown"]})


def test_published_ids_are_those_of_a_config_that_names_none(tmp_path: Path) -> None:
    config = {"vocab_size": 157184, "pad_token_id": 156892}
    own = LLaDA2MoeConfig(**config)
    assert (own.mask_token_id, own.eos_token_id) == (156895, 156892)
    assert Fast_dLLM_QwenConfig().mask_token_id == 151665
    folder = save_folder(random_llada2(dtype=torch.float32), tmp_path)
    entries = json.loads((folder / "config.json").read_text())
    del entries["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="mask_token_id=156895 is not an id of this model; use one from 0 to 63"):
        dllm.load(folder, device="cpu")


@pytest.mark.parametrize("entry", ["num_experts_per_tok", "topk_group", "routed_scaling_factor"])
def test_models_that_choose_other_experts_have_other_fingerprints(entry: str) -> None:
    lm = random_llada2()
    before = lm.backbone.fingerprint()
    setattr(lm.backbone.config, entry, 1)
    assert lm.backbone.fingerprint() != before


def _change(expert: Any, how: str) -> None:
    """Change an expert so that its output is zero, or has no gate."""
    if how == "weight":
        expert.down_proj.weight = nn.Parameter(torch.zeros_like(expert.down_proj.weight))
    elif how == "layer":
        expert.down_proj = nn.Linear(expert.down_proj.in_features, expert.down_proj.out_features, bias=False)
        nn.init.zeros_(expert.down_proj.weight)
    elif how == "bias":
        expert.down_proj.bias = nn.Parameter(torch.ones(len(expert.down_proj.weight)))
    elif how == "hook":
        expert.down_proj.register_forward_hook(lambda module, given, out: 0 * out)
    else:
        expert.register_forward_hook(lambda module, given, out: 0 * out)


@pytest.mark.parametrize("how", ["weight", "layer", "bias", "hook", "hook of an expert"])
@pytest.mark.parametrize("make", [random_llada2, random_sdar_moe, random_llada_moe])
def test_experts_that_are_changed_after_use_are_used_as_they_are(make: Maker, how: str) -> None:
    model = make(dtype=torch.float32).backbone
    ids = torch.tensor([[1, 2, 3, model.mask_token_id, model.mask_token_id]])
    with torch.inference_mode():
        before = model(ids).logits
    for experts in [part for part in model.modules() if isinstance(part, Experts)]:
        for expert in list(experts)[1:]:
            _change(expert, how)
    with torch.inference_mode():
        after = model(ids).logits
    torch.testing.assert_close(after, model(ids).logits.detach(), atol=1e-3, rtol=1e-4)  # one by one
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("make", [random_llada2, random_sdar, random_dream, random_fast_dllm])
def test_hooks_of_feed_forward_parts_run(make: Maker) -> None:
    lm, calls = make(dtype=torch.float32), list[str]()
    for name, part in lm.backbone.named_modules():
        if isinstance(part, GatedMLP) and ".experts." not in name:
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
    dllm.generate(lm, [[1, 2, 3]], gen_length=4)
    assert "model.layers.0.mlp" in calls


@pytest.mark.parametrize("make", [random_llada2, random_sdar_moe, random_llada])
def test_hooks_of_all_modules_run_for_norms_and_experts(make: Maker) -> None:
    model, calls = make(dtype=torch.float32).backbone, list[Any]()
    ids = torch.tensor([[1, 2, 3, model.mask_token_id]])
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        with torch.inference_mode():
            model(ids)
    finally:
        handle.remove()
    norms = [part for part in model.modules() if isinstance(part, RMSNorm)]
    assert {id(part) for part in norms} <= {id(part) for part in calls}
    if any(isinstance(part, Experts) for part in model.modules()):
        assert any(isinstance(part, GatedMLP) for part in calls)


def test_hooks_that_do_not_run_are_told() -> None:
    lm = random_sdar()
    lm.backbone.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    with pytest.warns(Notice, match="hooks of model.layers.1.self_attn do not run"):
        dllm.generate(lm, [[1, 2, 3]], gen_length=4)


def test_another_backbone_has_memory_of_its_own() -> None:
    one, other = random_llada(seed=0), random_llada(seed=1)
    expected = dllm.generate(other, [[1, 2, 3, 4]], gen_length=8).completions
    dllm.generate(one, [[1, 2, 3, 4]], gen_length=8)
    changed = replace(one, backbone=other.backbone)
    assert dllm.generate(changed, [[1, 2, 3, 4]], gen_length=8).completions.equal(expected)


@pytest.mark.parametrize("how", ["rope", "eps"])
def test_shared_blocks_are_of_the_constants_of_the_model(how: str) -> None:
    lm, prompt = random_sdar(), list(range(1, 17))

    def reused(engine: dllm.Engine) -> tuple[list[int], int]:
        engine.add(prompt, gen_length=8, seed=0)
        (answer,) = [each for step in engine.steps() for each in step.answers.values()]
        return answer.completion, answer.reused

    engine = dllm.Engine(lm, cache="block", max_length=64, batch_size=1)
    reused(engine)
    assert reused(engine)[1] > 0
    if how == "rope":
        lm.backbone.config.rope_theta = 50.0
    else:
        for part in lm.backbone.modules():
            if isinstance(part, RMSNorm):
                part.eps = 0.5
    expected = reused(dllm.Engine(lm, cache="none", max_length=64, batch_size=1))[0]
    assert reused(engine) == (expected, 0)


def test_only_the_first_part_of_a_head_is_rotated() -> None:
    whole, half = random_llada(), random_llada2()
    assert whole.backbone.rotary_dim == whole.backbone.head_dim == 8
    assert half.backbone.rotary_dim == 6
    assert half.backbone.head_dim == 12


@pytest.mark.parametrize("sampler", ["edit", "sub_blocks", "threshold"])
@makers
def test_the_command_decodes_with_each_family(make: Maker, sampler: str, tmp_path: Path) -> None:
    words = build_tokenizer()
    folder = save_folder(make(vocab=len(words) + 2, dtype=torch.float32), tmp_path)
    words.save_pretrained(folder)
    out = command(
        "generate", f"model={folder}", "prompt=Tom has 23 apples.", f"sampler={sampler}", "cache=block", "show=none",
        "gen_length=8", "seed=1",
    )  # fmt: skip
    assert out.code == 0, out.err
    assert "computed" in out.out


def test_published_commands_name_options_that_exist() -> None:
    text = "\n".join(page.read_text() for page in sorted((Path(__file__).parents[1] / "docs" / "models").iterdir()))
    commands = re.findall(r"^    dllm (generate (?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert len(commands) == 13
    for each in commands:
        name, *words = shlex.split(each.replace("\\\n", " "))
        options = [word for word in words if not word.startswith(("model=", "chat="))]
        out = command(name, *options, "model=/nowhere", "--cfg", "job", "--resolve")
        assert out.code == 0, out.err
