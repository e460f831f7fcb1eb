"""DiffusionGemma: transformers' modules in the engine, with other policies, exact caches, and from the command."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dllm
from commands import command
from dllm import models as families
from dllm.cache import Block
from dllm.decoding.window import Edit, Window
from dllm.evaluation.likelihood import Estimate, loglikelihood
from dllm.models import FAMILIES
from dllm.samplers import MultiBlock, Oracle, Prophet, Renoise, Threshold
from dllm.samplers.base import Policy
from golden_plan import plan
from models import random_diffusion_gemma, random_llada, save_folder

pytestmark = pytest.mark.skipif("diffusion_gemma" not in FAMILIES, reason="needs transformers 5.13")
SHARED = Path(__file__).parents[2] / "shared" / "golden" / "block" / "diffusion_gemma"
shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/golden/block is not here")
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
EXACT = ["none", "block", "prefix", "dual", "freecache"]
OPTIONS: dict[str, Any] = {"gen_length": 20, "stop_at_eos": False, "seed": 3}
FAST = Renoise(4, 2.0)


def rope(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["text_config"]["rope_parameters"]
    return found


@shared
def test_logits_are_the_published_ones() -> None:
    folder = SHARED / "diffusiongemma-rand-a"
    backbone, recorded = dllm.load(folder, device="cpu").backbone, load_file(folder / "logits.safetensors")
    for number in sorted({name.split(".")[0] for name in recorded}):
        own = {name.split(".")[1]: part for name, part in recorded.items() if name.startswith(f"{number}.")}
        logits, last = own.pop("logits"), own.pop("encoder_last_hidden_state")
        with torch.no_grad():
            found = backbone(**own)
        torch.testing.assert_close(found.logits, logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.encoder_last_hidden_state, last, rtol=0, atol=1e-4)


@shared
@pytest.mark.parametrize("cache", ["none", "block"])
def test_seeds_alone_repeat_the_published_decodes_beside_others(cache: str) -> None:
    # In float64: rounding in float32, which a batch changes, may decide after many random steps.
    lm = dllm.load(SHARED / "diffusiongemma-rand-a", device="cpu", dtype="float64")
    for line in (SHARED / "cases.jsonl").read_text().splitlines():
        case = json.loads(line)
        planned = None if case["fragile"] else plan(case, SHARED)
        if planned is None:
            continue
        sampler = Renoise(**{name: getattr(planned.sampler, name) for name in Renoise.__dataclass_fields__})
        seeds = [1, planned.options["seed"], 2]
        options = planned.options | {"seed": seeds}
        out = dllm.generate(lm, [[11, 12], case["prompt"], [7] * 40], sampler, cache, **options)
        found = out.sequences[1][out.attention_mask[1].bool()].tolist()
        length = min(len(found), len(case["sequence"]))
        assert length > len(case["prompt"])
        assert found[:length] == case["sequence"][:length]
        assert int(out.nfe[1]) <= case["nfe"]


@shared
def test_published_weights_are_written_back_byte_for_byte(tmp_path: Path) -> None:
    lm = dllm.load(SHARED / "diffusiongemma-rand-a", device="cpu")
    lm.backbone.save_pretrained(tmp_path)
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (SHARED / "diffusiongemma-rand-a" / name).read_bytes()


class TestFolder:
    def test_a_saved_model_loads_as_the_same(self, tmp_path: Path) -> None:
        lm = random_diffusion_gemma(dtype=torch.float32)
        loaded = dllm.load(save_folder(lm, tmp_path), device="cpu")
        assert type(loaded.backbone) is type(lm.backbone)
        assert loaded.backbone.fingerprint() == lm.backbone.fingerprint()
        runs = [dllm.generate(each, PROMPTS, FAST, **OPTIONS) for each in (lm, loaded)]
        assert torch.equal(runs[0].sequences, runs[1].sequences)

    def test_the_fingerprint_is_of_weights_and_constants(self, tmp_path: Path) -> None:
        folder = save_folder(random_diffusion_gemma(dtype=torch.bfloat16), tmp_path)
        first = dllm.load(folder, device="cpu").backbone.fingerprint()
        assert dllm.load(folder, device="cpu", dtype="float32").backbone.fingerprint() == first
        entries = json.loads((folder / "config.json").read_text())
        entries["text_config"]["sliding_window"] = 7
        (folder / "config.json").write_text(json.dumps(entries))
        assert dllm.load(folder, device="cpu").backbone.fingerprint() != first

    def test_ids_that_end_a_text_are_those_of_all_configs(self, tmp_path: Path) -> None:
        folder = save_folder(random_diffusion_gemma(dtype=torch.float32), tmp_path)
        entries = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [62, 7]}
        (folder / "config.json").write_text(json.dumps(entries))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [62, 9], "max_denoising_steps": 48}))
        assert dllm.load(folder, device="cpu").backbone.eos_token_ids == (62, 7, 9)

    def test_eager_attention_gives_the_same(self, tmp_path: Path) -> None:
        folder = save_folder(random_diffusion_gemma(), tmp_path)
        runs = [
            dllm.generate(dllm.load(folder, device="cpu", attn_implementation=each), PROMPTS, FAST, "block", **OPTIONS)
            for each in ("sdpa", "eager")
        ]
        assert torch.equal(runs[0].sequences, runs[1].sequences)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda config: config["text_config"].update(num_hidden_layers=2**20), "num_hidden_layers=1048576"),
            (lambda config: config["text_config"].update(num_hidden_layers=4), "layer_types names 3 layers"),
            (lambda config: config["vision_config"].update(num_hidden_layers=4), "is missing"),
            (lambda config: config["text_config"].update(num_experts=None), "num_experts=None is not a valid size"),
            (lambda config: config["text_config"].update(hidden_size=10**12), "hidden_size"),
            (lambda config: config["text_config"].update(vocab_size=65), "has another shape"),
            (lambda config: config["text_config"].update(layer_types=["other"] * 3), "layer_types"),
            (lambda config: config["text_config"].update(use_bidirectional_attention="all"), "is not supported"),
            (lambda config: config["text_config"].update(eos_token_id=64), "eos_token_id=64 is not an id"),
            (lambda config: config["text_config"].update(eos_token_id=None), "has no eos_token_id"),
            (lambda config: config["vision_config"].update(model_type="timm_wrapper"), "gemma4_vision"),
            (lambda config: config["vision_config"].update(num_hidden_layers=2**20), "num_hidden_layers=1048576"),
            (lambda config: config["text_config"].update(top_k_experts=10**7), "top_k_experts=10000000 is more than"),
            (lambda config: rope(config).update(full_attention=None), "rope_parameters.full_attention=None is not"),
            (
                lambda config: rope(config).pop("sliding_attention"),
                "rope_parameters=.* is not supported; give those of",
            ),
            (
                lambda config: rope(config)["full_attention"].update(partial_rotary_factor=1.5),
                "partial_rotary_factor=1.5",
            ),
            (
                lambda config: rope(config)["full_attention"].update(partial_rotary_factor=10**8),
                "partial_rotary_factor=",
            ),
            (lambda config: rope(config)["full_attention"].update(factor=4.0), "full_attention=.* is not supported"),
            (lambda config: rope(config)["full_attention"].update(rope_theta=None), "rope_theta=None"),
            (
                lambda config: rope(config)["sliding_attention"].update(rope_type="yarn"),
                "rope_type='yarn' is not supported",
            ),
            (
                lambda config: config["vision_config"].update(rope_parameters=[1]),
                "vision_config.rope_parameters=.1. is not",
            ),
            (lambda config: config.update(canvas_length=0), "canvas_length=0 is not a valid size"),
            (lambda config: config.update(text_config=None), "text_config"),
            (lambda config: config["text_config"]["per_layer_config"].update({"0": {"hidden_size": 8}}), "per_layer"),
        ],
    )
    def test_a_config_that_does_not_fit_is_refused_in_one_line(
        self, change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
    ) -> None:
        folder = save_folder(random_diffusion_gemma(dtype=torch.float32), tmp_path)
        entries = json.loads((folder / "config.json").read_text())
        change(entries)
        (folder / "config.json").write_text(json.dumps(entries))
        with pytest.raises(ValueError, match=message) as caught:
            dllm.load(folder, device="cpu")
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)

    def test_older_transformers_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = save_folder(random_diffusion_gemma(dtype=torch.float32), tmp_path)
        monkeypatch.delitem(families.FAMILIES, "diffusion_gemma")
        monkeypatch.delitem(families.ARCHITECTURES, "DiffusionGemmaForBlockDiffusion")
        with pytest.raises(ValueError, match=r"needs transformers 5\.13 or newer, and .* is installed"):
            dllm.load(folder, device="cpu")

    def test_packing_is_refused_or_left_out(self, tmp_path: Path) -> None:
        folder = save_folder(random_diffusion_gemma(dtype=torch.float32), tmp_path)
        assert dllm.load(folder, device="cpu", pack="auto").backbone.packed_weights is None
        with pytest.raises(ValueError, match="pack=true does not support the layers of this model"):
            dllm.load(folder, device="cpu", pack=True)


POLICIES: dict[str, Any] = {
    "threshold": Threshold(0.2), "edit": "edit", "lopa": "lopa", "vanilla": "vanilla", "eb": "eb", "t2m": "t2m",
    "saber": "saber", "remdm": "remdm", "klass": "klass", "multiblock": MultiBlock(Threshold(0.2)),
    "prophet": Prophet(None, 4.0, 2.5, 1.5), "oracle": "oracle",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        pytest.param(name, cache, marks=pytest.mark.xdist_group(f"gemma-{name}"))  # which share `lone_rows`
        for name in POLICIES
        for cache in (EXACT if name in ("threshold", "lopa") else ["block"])
    ],
)
def test_other_policies_ignore_batchmates_and_exact_caches(name: str, cache: str) -> None:
    sampler = POLICIES[name]
    lm = random_diffusion_gemma()
    together = dllm.generate(lm, PROMPTS, sampler, cache, **OPTIONS, batch_size=2)
    assert not (together.completions == lm.backbone.mask_token_id).any()
    for row, alone in enumerate(lone_rows(name)):
        assert together.completions[row].tolist() == alone.completions[0].tolist()
        assert together.nfe[row] == alone.nfe[0]


@functools.cache
def lone_rows(name: str) -> list[dllm.Generation]:
    """What a policy makes of each prompt by itself, without a cache."""
    lm = random_diffusion_gemma()
    return [
        dllm.generate(lm, [prompt], POLICIES[name], **OPTIONS | {"seed": 3 + row}) for row, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("cache", EXACT[1:])
def test_finished_text_is_encoded_once(cache: str) -> None:
    lm, prompt = random_diffusion_gemma(), list(range(1, 31))
    out = dllm.generate(lm, [prompt], Threshold(0.0), cache, gen_length=24, seed=0, stop_at_eos=False)
    assert out.nfe.tolist() == [3]
    assert out.stats.computed_columns == 30 + 8 + 8 + 8 + 8 + 8  # each block once open, and once finished but the last


def test_undecided_positions_are_random_and_conditioned_on_the_last_prediction() -> None:
    lm, seen = random_diffusion_gemma(), []
    decode = lm.backbone.decode

    def watched(finished: Any, block: Any) -> torch.Tensor:
        seen.append((block.tokens[0].tolist(), block.signal[0].abs().sum(-1) > 0))
        return decode(finished, block)

    lm.backbone.decode = watched
    steps: list[Any] = []
    dllm.generate(lm, [[5]], "vanilla", gen_length=8, seed=1, callback=steps.append)
    lm.backbone.decode = decode
    tokens = [each for each, _ in seen]
    assert all(0 <= token < 64 for row in tokens for token in row)
    assert all(first != later for first, later in pairwise(tokens))
    assert [bool(given.any()) for _, given in seen] == [False] + [True] * 7
    assert all(given.all() for _, given in seen[1:])
    for before, step in zip(tokens[1:], steps, strict=False):
        decided = step.tokens[0, -8:] < 64
        assert [a for a, fixed in zip(before, decided, strict=True) if fixed] == step.tokens[0, -8:][decided].tolist()


def test_a_seed_decides_at_temperature_0_as_well() -> None:
    lm = random_diffusion_gemma()
    runs = [dllm.generate(lm, PROMPTS, "threshold", **OPTIONS | {"seed": seed}).completions for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("sampler", [FAST, "threshold"])
def test_masks_within_a_text_are_filled(sampler: Any) -> None:
    lm, mask = random_diffusion_gemma(), 64
    texts = [[5, mask, mask, 7, mask, 9, *[mask] * 9], [mask, 3]]
    for cache in EXACT:
        out = dllm.infill(lm, texts, sampler, cache, seed=1)
        for text, row in zip(texts, out.completions.tolist(), strict=True):
            filled = row[-len(text) :]
            assert [b for a, b in zip(text, filled, strict=True) if a != mask] == [a for a in text if a != mask]
            assert all(0 <= token < mask for token in filled)


def test_a_block_may_have_another_length() -> None:
    lm = random_diffusion_gemma()
    whole, short = (dllm.generate(lm, PROMPTS, FAST, **OPTIONS, block_length=each) for each in (20, 4))
    assert whole.nfe.tolist() == [4] * 3
    assert short.nfe.tolist() == [20] * 3
    assert dllm.generate(lm, PROMPTS, FAST, **OPTIONS).nfe.tolist() == [12] * 3


def test_an_engine_of_before_a_resize_is_refused() -> None:
    lm = random_diffusion_gemma()
    engine = dllm.Engine(lm, FAST, batch_size=1, max_length=32)
    lm.backbone.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(ValueError, match="make a new engine"):
        engine.add([3, 4, 5], gen_length=8)


@pytest.mark.parametrize("sampler", [FAST, "threshold", "remdm"])
@pytest.mark.parametrize("block_length", [None, 20])
def test_a_canvas_may_be_shorter_than_a_block(sampler: Any, block_length: int | None) -> None:
    lm, options = random_diffusion_gemma(), {"gen_length": 3, "seed": 2, "block_length": block_length}
    alone = dllm.generate(lm, [[5, 6]], sampler, **options).completions[0]
    assert alone.tolist() == dllm.generate(lm, [[5, 6], list(range(30))], sampler, **options).completions[0].tolist()


@pytest.mark.parametrize(
    ("sampler", "cache", "options", "message"),
    [
        ("wino", "none", {}, "positions that only attend to the canvas"),
        ("freedave", "none", {}, "lossless drafting"),
        ("daedal", "none", {}, "use another sampler"),
        (FAST, "none", {"cfg_scale": 1.0}, "use cfg_scale=0"),
        (FAST, "none", {"cuda_graphs": True}, "use cuda_graphs=null"),
        (FAST, Block(measure_every=2), {}, "use measure_every=null"),
        *((FAST, cache, {}, "use cache=none, or block") for cache in ("dkv", "d2cache", "dllm_cache", "sub_blocks")),
    ],
)
def test_what_it_does_not_run_with_is_refused_in_one_line(
    sampler: Any, cache: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        dllm.generate(random_diffusion_gemma(), PROMPTS, sampler, cache, **OPTIONS, **options)
    assert "\n" not in str(caught.value)


def test_log_likelihoods_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has no \[MASK\], which estimates of the log-likelihood need"):
        loglikelihood(random_diffusion_gemma(), [1], [2, 3], Estimate())


def test_the_command_decodes(tmp_path: Path) -> None:
    folder = save_folder(random_diffusion_gemma(dtype=torch.float32, tokenizer=True), tmp_path)
    common = "generate", f"model={folder}", "prompt=Tom has 23 apples.", "gen_length=16", "seed=1", "show=none"
    outs = [command(*common, "sampler=renoise", "sampler.max_steps=4", f"cache={cache}") for cache in ("none", "block")]
    assert [out.code for out in outs] == [0, 0], outs[0].err + outs[1].err
    assert outs[0].out.splitlines()[:2] == outs[1].out.splitlines()[:2]
    assert "NFE 8" in outs[0].out
    assert command(*common, "sampler=threshold", "temperature=0.7").code == 0
    for words, message in (
        (["sampler=renoise", "temperature=0.7"], "temperature=0.7 has no effect on renoise"),
        (["sampler=wino"], "is not compatible with"),
        (["sampler=renoise", "sampler.t_max=0"], "sampler.t_max=0 is out of range"),
    ):
        out = command(*common, *words)
        assert (out.code, out.out) == (2, "")
        assert out.err.startswith("dllm generate: error: ")
        assert message in out.err
        assert out.err.count("\n") == 1


def test_timing_against_a_bare_forward_is_refused(tmp_path: Path) -> None:
    folder = save_folder(random_diffusion_gemma(dtype=torch.float32), tmp_path)
    out = command("bench", f"model={folder}", "caches=[none]", "canvas=32", "gen_length=16")
    assert (out.code, out.out) == (2, "")
    assert "no bare forward to compare with; use dllm evaluate" in out.err
    assert out.err.count("\n") == 1


def test_evaluating_resumes_with_the_same_settings(tmp_path: Path) -> None:
    folder = save_folder(random_diffusion_gemma(dtype=torch.float32, tokenizer=True), tmp_path / "model")
    words = (
        "evaluate", f"model={folder}", "task=word_problems", "task.limit=2", "gen_length=16", "sampler=renoise",
        "sampler.max_steps=4", "cache=block", f"out={tmp_path}/run", "baselines=0",
    )  # fmt: skip
    first, again = command(*words), command(*words)
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert "NFE 8.0" in first.out
    assert "NFE 8.0" in again.out


def test_the_command_refuses_renoising_over_masks_in_one_line() -> None:
    out = command("generate", "model=tiny-llada", "prompt=Tom", "sampler=renoise", "gen_length=8")
    assert (out.code, out.out) == (2, "")
    assert out.err.startswith(
        "dllm generate: error: LLaDAModelLM is not compatible with a policy over uniformly random"
    )
    assert out.err.count("\n") == 1


@dataclass(frozen=True)
class Tempered(Policy):
    """Commits one token a step, from logits over a temperature of its own."""

    temperature: float = 1.0
    seen: list[torch.Tensor] = field(default_factory=list)

    def step(self, window: Window, denoise: Any, state: None) -> Edit:
        prediction = denoise(temperature=torch.full(window.rows.shape, self.temperature))
        self.seen.append(prediction.logits)
        first = window.masked & (window.masked.cumsum(-1) == 1)
        return Edit(window.columns, prediction.tokens, first)


@pytest.mark.parametrize("make", [random_llada, random_diffusion_gemma])
def test_a_policy_may_divide_the_logits_of_a_row(make: Any) -> None:
    lm, plain, warm = make(), Tempered(1.0), Tempered(2.0)
    for sampler in (plain, warm):
        dllm.generate(lm, [[5, 6]], sampler, gen_length=8, seed=1)
    torch.testing.assert_close(warm.seen[0], plain.seen[0] / 2)
    conditioned = not torch.equal(warm.seen[1], plain.seen[1] / 2)
    assert conditioned == lm.backbone.uniform  # the next forward is told of the divided ones


def test_an_oracle_repeats_renoising() -> None:
    lm = random_diffusion_gemma()
    found = dllm.generate(lm, PROMPTS, Oracle(FAST), **OPTIONS)
    assert torch.equal(found.completions, dllm.generate(lm, PROMPTS, FAST, **OPTIONS).completions)
