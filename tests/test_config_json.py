"""What a checkpoint's config.json says about positions, special tokens and the vocabulary is followed, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dllm
from dllm.evaluation.likelihood import Estimate, loglikelihood
from dllm.guide import Guide
from dllm.models import DreamConfig, LLaDAConfig
from dllm.tasks.tokenizer import build_tokenizer
from models import random_dream, random_guide, random_llada, save_folder

Maker = Callable[..., dllm.LanguageModel]
FAMILIES = pytest.mark.parametrize("make", [random_llada, random_dream])
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Maker], Path]]:
    """Gives the folder of a model of each family."""
    folders = {make: save_folder(make(), tmp_path_factory.mktemp("saved")) for make in (random_llada, random_dream)}
    return folders.__getitem__


@pytest.fixture
def edited(saved: Callable[[Maker], Path], tmp_path: Path) -> Callable[..., Path]:
    """Gives a private copy of a family's folder, with other entries in its config.json."""

    def edit(make: Maker, *, without: tuple[str, ...] = (), **entries: Any) -> Path:
        folder = Path(shutil.copytree(saved(make), tmp_path / "checkpoint", dirs_exist_ok=True))
        config = json.loads((saved(make) / "config.json").read_text()) | entries
        kept = {key: value for key, value in config.items() if key not in without}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return edit


@torch.no_grad()
def logits(lm: dllm.LanguageModel) -> Tensor:
    return lm.backbone(torch.arange(12)[None]).logits


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # every caller looks at the message
        dllm.load(folder, device="cpu")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


class TestRotaryEmbedding:
    @FAMILIES
    @pytest.mark.parametrize(
        "entries",
        [
            {"rope_parameters": DEFAULT},
            {"rope_scaling": DEFAULT},
            {"rope_parameters": DEFAULT, "rope_scaling": None},
            {"rope_parameters": DEFAULT, "rope_theta": 10000},
            {"rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
            {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default"}},
            {"rope_theta": 10000.0, "rope_scaling": {"type": "default"}, "rope_parameters": {}},
        ],
        ids=str,
    )
    def test_unscaled_positions_are_read_in_every_layout(
        self, make: Maker, entries: dict[str, Any], edited: Callable[..., Path]
    ) -> None:
        lm = dllm.load(edited(make, without=() if "rope_theta" in entries else ("rope_theta",), **entries))
        assert torch.equal(logits(lm), logits(make()))

    @FAMILIES
    def test_the_base_counts_and_is_saved_in_the_published_layout(
        self, make: Maker, edited: Callable[..., Path], tmp_path: Path
    ) -> None:
        other = {"rope_type": "default", "rope_theta": 100.0}
        lm = dllm.load(edited(make, without=("rope_theta",), rope_parameters=other), device="cpu")
        assert not torch.allclose(logits(lm), logits(make()))
        lm.backbone.save_pretrained(tmp_path / "again")
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        assert config["rope_theta"] == 100.0
        assert "rope_parameters" not in config
        assert torch.equal(logits(dllm.load(tmp_path / "again", device="cpu")), logits(lm))

    @FAMILIES
    @pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
    @pytest.mark.parametrize(
        "value",
        [
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
            {"type": "linear", "factor": 2.0},
            {"rope_type": "default", "type": "dynamic"},
            DEFAULT | {"factor": 2.0},
            DEFAULT | {"partial_rotary_factor": 0.5},
            {"full_attention": DEFAULT},
            [DEFAULT],
            "default",
            True,
        ],
        ids=str,
    )
    def test_scaled_or_partial_rotation_is_refused(
        self, make: Maker, key: str, value: Any, edited: Callable[..., Path]
    ) -> None:
        assert f"{key}={value!r} is not supported" in refusal(edited(make, **{key: value}))

    @FAMILIES
    @pytest.mark.parametrize(
        ("entries", "expected"),
        [
            ({"rope_parameters": DEFAULT | {"rope_theta": 7.0}}, "rope_theta=10000.0 and rope_parameters."),
            ({"rope_scaling": DEFAULT | {"rope_theta": 7.0}}, "rope_theta=10000.0 and rope_scaling."),
            ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta='1e4'"),
            ({"rope_theta": None}, "rope_theta=None"),
            ({"rope_theta": True}, "rope_theta=True"),
            ({"rope_theta": float("inf")}, "rope_theta=inf"),
            ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ],
        ids=str,
    )
    def test_a_base_that_is_none_or_said_twice_is_refused(
        self, make: Maker, entries: dict[str, Any], expected: str, edited: Callable[..., Path]
    ) -> None:
        assert expected in refusal(edited(make, **entries))

    def test_heads_of_an_odd_width_are_refused(self) -> None:
        with pytest.raises(ValueError, match="heads of 3"):
            LLaDAConfig(d_model=12, n_heads=4, n_kv_heads=4)
        with pytest.raises(ValueError, match="heads of 3"):
            DreamConfig(hidden_size=12, num_attention_heads=4)


class TestArchitecture:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("alibi", True),
            ("rope", False),
            ("rope_full_precision", False),
            ("include_bias", True),
            ("include_qkv_bias", True),
            ("bias_for_layer_norm", True),
            ("layer_norm_type", "default"),
            ("layer_norm_with_affine", False),
            ("attention_layer_norm", True),
            ("activation_type", "swiglu"),
            ("block_type", "sequential"),
            ("scale_logits", True),
            ("input_emb_norm", True),
            ("weight_tying", True),
            ("tie_word_embeddings", True),
            ("multi_query_attention", True),
        ],
    )
    def test_what_llada_does_not_compute_is_refused(self, key: str, value: Any, edited: Callable[..., Path]) -> None:
        assert f"{key}={value!r} is not supported" in refusal(edited(random_llada, **{key: value}))

    @pytest.mark.parametrize(
        ("key", "value"),
        [("hidden_act", "gelu"), ("use_sliding_window", True), ("tie_word_embeddings", True), ("use_mrope", True)],
    )
    def test_what_dream_does_not_compute_is_refused(self, key: str, value: Any, edited: Callable[..., Path]) -> None:
        assert f"{key}={value!r} is not supported" in refusal(edited(random_dream, **{key: value}))

    @FAMILIES
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("clip_qkv", 8.0), ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0),
            ("query_pre_attn_scalar", 224), ("attention_multiplier", 0.1), ("embedding_multiplier", 12.0),
            ("residual_multiplier", 0.22), ("logits_scaling", 8.0), ("logit_scale", 0.5), ("hidden_act", "gelu"),
            ("activation_type", "relu"), ("norm_after", True), ("no_rope_layers", [0]), ("rotary_pct", 0.25),
            ("layer_types", ["full_attention", "sliding_attention"]), ("use_sliding_window", True),
            ("scale_logits", True), ("alibi", True),
        ],
    )  # fmt: skip
    def test_what_only_other_models_compute_is_refused(
        self, make: Maker, key: str, value: Any, edited: Callable[..., Path]
    ) -> None:
        assert f"{key}={value!r} is not supported" in refusal(edited(make, **{key: value}))

    @FAMILIES
    @pytest.mark.parametrize(
        "entries", [{"n_head": 8}, {"num_heads": 2}, {"num_kv_heads": 1}, {"n_ctx": 128}, {"head_dim": 5}], ids=str
    )
    def test_a_size_under_another_name_is_refused_where_it_differs(
        self, make: Maker, entries: dict[str, int], edited: Callable[..., Path]
    ) -> None:
        ((name, value),) = entries.items()
        assert f"{name}={value} is not read, and " in refusal(edited(make, **entries))

    @pytest.mark.parametrize(
        ("make", "own", "other"),
        [
            (random_llada, "n_heads", "num_attention_heads"),
            (random_llada, "n_kv_heads", "num_key_value_heads"),
            (random_llada, "max_sequence_length", "max_position_embeddings"),
            (random_dream, "num_attention_heads", "n_heads"),
            (random_dream, "max_position_embeddings", "max_sequence_length"),
        ],
    )
    def test_a_size_under_the_name_of_the_other_family_alone_is_refused(
        self, make: Maker, own: str, other: str, edited: Callable[..., Path]
    ) -> None:
        value = 2 if "heads" in own else 128
        assert f"{other}={value} is not read, and {own} is" in refusal(edited(make, without=(own,), **{other: value}))

    @FAMILIES
    def test_keys_that_change_nothing_are_ignored(self, make: Maker, edited: Callable[..., Path]) -> None:
        harmless = {
            "clip_qkv": None, "logits_scaling": 1.0, "layer_types": ["full_attention"] * 2, "hidden_act": "silu",
            "num_attention_heads": 4, "n_heads": 4, "is_decoder": False, "something": "else", "layer_norm_eps": 1e-12,
        }  # fmt: skip
        assert torch.equal(logits(dllm.load(edited(make, **harmless), device="cpu")), logits(make()))

    @FAMILIES
    @pytest.mark.parametrize(
        ("entries", "expected"),
        [
            ({"dtype": "float33"}, "float33"),
            ({"quantization_config": {"quant_method": "magic"}}, "magic"),
            ({"quantization_config": 3}, "quantization_config=3 is not supported"),
        ],
        ids=str,
    )
    def test_what_transformers_stumbles_over_is_one_line(
        self, make: Maker, entries: dict[str, Any], expected: str, edited: Callable[..., Path]
    ) -> None:
        assert expected in refusal(edited(make, **entries))


class TestSpecialIds:
    @FAMILIES
    @pytest.mark.parametrize("value", [None, True, 3.0, "3", [3], {}, -1, 64], ids=str)
    def test_a_mask_that_is_no_id_is_refused(self, make: Maker, value: Any, edited: Callable[..., Path]) -> None:
        assert f"mask_token_id={value!r} is not a" in refusal(edited(make, mask_token_id=value))

    @FAMILIES
    @pytest.mark.parametrize("value", [True, 3.0, "3", {}, [None], [[3]], [3, "4"], -1, [3, 64]], ids=str)
    def test_an_end_of_text_that_is_no_id_is_refused(
        self, make: Maker, value: Any, edited: Callable[..., Path]
    ) -> None:
        assert "eos_token_id=" in refusal(edited(make, eos_token_id=value))
        folder = edited(make)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert "eos_token_id=" in refusal(folder)

    @FAMILIES
    @pytest.mark.parametrize("key", ["mask_token_id", "eos_token_id"])
    def test_a_config_without_the_id_is_refused(self, make: Maker, key: str, edited: Callable[..., Path]) -> None:
        assert f"config.json has no {key}" in refusal(edited(make, without=(key,)))

    def test_a_config_made_by_hand_is_refused_too(self) -> None:
        for config in (LLaDAConfig, DreamConfig):
            with pytest.raises(ValueError, match="mask_token_id=None"):
                config(mask_token_id=None)


@pytest.fixture
def spare(saved: Callable[[Maker], Path], tmp_path: Path) -> dllm.LanguageModel:
    """A LLaDA with 16 rows more than tokens, which it would predict everywhere."""
    folder = Path(shutil.copytree(saved(random_llada), tmp_path / "spare"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"embedding_size": 80}))
    weights = load_file(folder / "model.safetensors")
    for name, factor in (("model.transformer.wte.weight", 1.0), ("model.transformer.ff_out.weight", 10.0)):
        weights[name] = torch.cat((weights[name], factor * weights[name][:16]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return dllm.load(folder, device="cpu")


class TestSpareRows:
    def test_they_change_no_prediction(self, spare: dllm.LanguageModel) -> None:
        plain = random_llada()
        torch.testing.assert_close(logits(spare), logits(plain))
        for options in ({}, {"temperature": 1.0, "seed": 3}, {"cfg_scale": 1.0}):
            some, other = (dllm.generate(lm, [[5, 6, 7]], "vanilla", gen_length=32, **options) for lm in (spare, plain))
            assert some.sequences.tolist() == other.sequences.tolist()
            dllm.generate(spare, some.sequences.tolist(), "vanilla", gen_length=8)
        likely, as_likely = (loglikelihood(lm, [5, 6], [7, 8], Estimate(samples=4)) for lm in (spare, plain))
        assert likely == pytest.approx(as_likely)

    def test_a_guide_reads_what_is_written(self, spare: dllm.LanguageModel) -> None:
        sampler = dllm.samplers.ARGuided(guide=random_guide())
        out = dllm.generate(spare, [[5, 6, 7]], sampler, gen_length=32)
        assert out.sequences.max() < 64

    def test_a_special_token_among_them_is_refused(self, spare: dllm.LanguageModel) -> None:
        folder = Path(spare.name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": 70}))
        assert "mask_token_id=70 is not an id of this model; use one from 0 to 63" in refusal(folder)

    @pytest.mark.parametrize("size", [63, 0, -1, True, 64.0, "80"])
    def test_fewer_rows_than_tokens_are_refused(self, size: Any, edited: Callable[..., Path]) -> None:
        assert f"embedding_size={size!r}" in refusal(edited(random_llada, embedding_size=size))


@FAMILIES
def test_ids_without_a_token_are_predicted_and_read_as_nothing(make: Maker) -> None:
    tokenizer = build_tokenizer()
    lm = make(vocab=len(tokenizer) + 40)
    config = lm.backbone.config
    config.mask_token_id, config.eos_token_id = tokenizer.mask_token_id, tokenizer.eos_token_id
    with torch.no_grad():
        lm.backbone.get_output_embeddings().weight[: len(tokenizer)] *= 0.01
    lm = dllm.LanguageModel(lm.backbone, tokenizer, "padded")
    guide = Guide(random_guide(len(tokenizer)), build_tokenizer())
    guided = (dllm.samplers.ARGuided(guide=guide, on_reject=on_reject) for on_reject in ("draft", "guide"))
    for sampler in ("vanilla", "threshold", *guided):
        out = dllm.generate(lm, ["Tom has 3 apples ."], sampler, gen_length=16, stop_at_eos=False)
        # What the guide writes in place of a draft are tokens of its own.
        assert (out.sequences >= len(tokenizer)).any() == (getattr(sampler, "on_reject", None) != "guide")
        assert isinstance(out.texts[0], str)
        dllm.generate(lm, out.sequences.tolist(), "vanilla", gen_length=8)


@FAMILIES
@pytest.mark.parametrize("size", [48, 80])
def test_a_resized_model_loads_as_it_was_saved(make: Maker, size: int, tmp_path: Path) -> None:
    lm = make()
    lm.backbone.config.mask_token_id, lm.backbone.config.eos_token_id = 40, 41
    lm.backbone.resize_token_embeddings(size, mean_resizing=False)
    assert logits(lm).shape[-1] == size
    again = dllm.load(save_folder(lm, tmp_path), device="cpu")
    assert again.backbone.config.vocab_size == size
    assert torch.equal(logits(again), logits(lm))
    out = dllm.generate(again, [[5, 6, 7]], "vanilla", gen_length=16)
    dllm.generate(again, out.sequences.tolist(), "vanilla", gen_length=8)
