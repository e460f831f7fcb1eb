"""An adapter is merged into the weights where it is asked for, and never applied or left out without a word."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dllm
from commands import command
from dllm.checks import Notice
from dllm.guide import load_guide
from dllm.tasks.tokenizer import build_tokenizer
from models import random_diffusion_gemma, random_dream, random_fast_dllm, random_guide, random_llada, save_folder

peft = pytest.importorskip("peft")

Maker = Callable[..., dllm.LanguageModel]
FAMILIES = pytest.mark.parametrize("make", [random_llada, random_dream])
IDS = torch.arange(12)[None]
FILE = "adapter_model.safetensors"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return getattr(model, "backbone", model)(IDS).logits


def save_adapter(make: Maker, folder: Path, base: Any = None, **options: Any) -> Tensor:
    """Write a random adapter of a family's model; return what the model computes with it."""
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]} | options
    model = peft.get_peft_model(make().backbone, peft.LoraConfig(**options))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype) * 0.3)
    model.save_pretrained(folder)
    edit_config(folder, base_model_name_or_path=base)
    return logits(model)


def edit_config(folder: Path, **entries: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # every caller looks at the message
        dllm.load(*arguments, device="cpu", **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_folder(random_llada(), tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(random_llada, tmp_path / "adapter")
    return tmp_path / "adapter"


@FAMILIES
@pytest.mark.parametrize(
    "options",
    [{}, {"task_type": "CAUSAL_LM"}, {"use_dora": True}, {"target_modules": "all-linear"}, {"modules_to_save": True}],
    ids=str,
)
def test_the_model_computes_what_it_does_with_the_adapter(make: Maker, options: Any, tmp_path: Path) -> None:
    if "modules_to_save" in options:
        options = {"modules_to_save": ["ff_out" if make is random_llada else "lm_head"]}
    base = save_folder(make(), tmp_path / "base")
    expected = save_adapter(make, tmp_path / "adapter", **options)
    lm = dllm.load(base, device="cpu", adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(lm), expected)
    assert not torch.allclose(logits(lm), logits(make()))
    assert lm.adapter == tmp_path / "adapter"
    assert str(base) in lm.name
    assert str(tmp_path / "adapter") in lm.name
    assert lm.backbone.fingerprint() != dllm.load(base, device="cpu").backbone.fingerprint()
    # What comes out is a model as any other.
    assert all(parameter.requires_grad for parameter in lm.backbone.parameters())
    again = dllm.load(save_folder(lm, tmp_path / "merged"), device="cpu")
    assert torch.equal(logits(again), logits(lm))
    assert again.adapter is None
    out = dllm.generate(lm, [[5, 6, 7]], "threshold", gen_length=16)
    assert out.sequences.tolist() == dllm.generate(again, [[5, 6, 7]], "threshold", gen_length=16).sequences.tolist()


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(r=16, oft_block_size=0, block_share=True, target_modules=["q_proj"]),
        peft.VeraConfig(r=256, target_modules=["q_proj"]),
        peft.LoHaConfig(r=4, target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.ShiraConfig(r=2, target_modules=["q_proj"]),
        peft.SupertuningConfig(target_modules=["q_proj"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_other_kinds_are_merged(config: Any, base: Path, tmp_path: Path) -> None:
    model: Any = peft.get_peft_model(random_llada().backbone, config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype) * 0.1)
    model.save_pretrained(tmp_path / "own")
    torch.testing.assert_close(logits(dllm.load(base, device="cpu", adapter=tmp_path / "own")), logits(model))


def test_merged_weights_can_be_packed(base: Path, adapter: Path) -> None:
    packed = dllm.load(base, device="cpu", dtype="float32", adapter=str(adapter), pack=True)
    plain = dllm.load(base, device="cpu", dtype="float32", adapter=str(adapter))
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-4, rtol=1e-4)


@FAMILIES
def test_a_folder_that_is_an_adapter_loads_the_model_it_names(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_folder(make(), tmp_path / "base")
    expected = save_adapter(make, tmp_path / "adapter", base=str(base))
    lm = dllm.load(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(logits(lm), expected)
    assert (lm.name, lm.adapter) == (str(tmp_path / "adapter"), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(logits(dllm.load("adapter", device="cpu")), expected)


def test_no_module_that_it_names_is_imported(base: Path, tmp_path: Path) -> None:
    expected = save_adapter(random_llada, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", megatron_config={"hidden_size": 1}, megatron_core="this")
    torch.testing.assert_close(logits(dllm.load(base, device="cpu", adapter=tmp_path / "adapter")), expected)
    assert "this" not in sys.modules


def test_a_random_decomposition_is_refused(base: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ValueError, match="random decomposition"):
        dllm.load(base, device="cpu", adapter=adapter)


@pytest.mark.parametrize("base", [None, "", 3, "no/such/folder", "nothing"])
def test_an_adapter_whose_model_is_not_found_is_refused(base: Any, adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path=base)
    message = refusal(adapter)
    assert str(adapter) in message
    assert "base" in message


def test_an_adapter_of_an_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, base_model_name_or_path=str(base))
    assert f"name={str(adapter)!r} is an adapter itself" in refusal(adapter, adapter=adapter)


def test_the_adapters_tokenizer_goes_before_the_models(tmp_path: Path) -> None:
    base = save_folder(random_llada(tokenizer=True), tmp_path / "base")
    save_adapter(lambda: random_llada(tokenizer=True), tmp_path / "adapter")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "its own"
    lm = dllm.load(base, device="cpu", adapter=tmp_path / "adapter")
    assert lm.tokenizer is not None
    assert lm.tokenizer.chat_template != "its own"
    tokenizer.save_pretrained(tmp_path / "adapter")
    lm = dllm.load(base, device="cpu", adapter=tmp_path / "adapter")
    assert lm.tokenizer is not None
    assert lm.tokenizer.chat_template == "its own"


class TestBesideTheWeights:
    @pytest.fixture
    def both(self, base: Path, adapter: Path) -> Path:
        """A folder that holds a model and an adapter of it."""
        for file in ("adapter_config.json", FILE):
            shutil.copy(adapter / file, base / file)
        return base

    @pytest.mark.parametrize("installed", [True, False])
    def test_it_is_refused_unless_asked_for(self, both: Path, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not installed:
            monkeypatch.setitem(sys.modules, "peft", None)
            monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: False)
        message = refusal(both)
        assert "adapter_config.json" in message
        assert f"adapter={str(both)!r}" in message

    def test_it_is_applied_once_where_it_is_asked_for(self, both: Path, adapter: Path, tmp_path: Path) -> None:
        expected = save_adapter(random_llada, tmp_path / "again")
        for asked in (both, adapter):
            torch.testing.assert_close(logits(dllm.load(both, device="cpu", adapter=asked)), expected)

    def test_another_adapter_is_applied_alone(self, both: Path, tmp_path: Path) -> None:
        expected = save_adapter(random_llada, tmp_path / "other", target_modules=["k_proj"])
        torch.testing.assert_close(logits(dllm.load(both, device="cpu", adapter=tmp_path / "other")), expected)

    def test_a_guide_with_one_is_refused(self, adapter: Path, tmp_path: Path) -> None:
        random_guide().save_pretrained(tmp_path / "guide")
        shutil.copy(adapter / "adapter_config.json", tmp_path / "guide")
        with pytest.raises(ValueError, match="holds an adapter"):
            load_guide(str(tmp_path / "guide"), torch.device("cpu"))
        with pytest.raises(ValueError, match="holds an adapter"):
            load_guide(str(adapter), torch.device("cpu"))


def _change_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / FILE)
        change(weights)
        save_file(weights, folder / FILE)

    return edit


def _other_model(folder: Path) -> None:
    save_adapter(random_dream, folder, target_modules=["down_proj"])


LORA = "base_model.model.model.transformer.blocks.1.q_proj.lora_A.weight"
ENDLESS = r"(([a-z_0-9.]+)+)+\$"  # tries every way to split a name
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    "no weights": (lambda folder: (folder / FILE).unlink(), "adapter_model"),
    "config is not JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not JSON"),
    "config is no object": (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "JSON list"),
    "unknown kind": (lambda folder: edit_config(folder, peft_type="MAGIC"), "MAGIC"),
    "prompts": (lambda folder: edit_config(folder, peft_type="PROMPT_TUNING", num_virtual_tokens=4), "PROMPT_TUNING"),
    "other adapters": (
        lambda folder: edit_config(folder, peft_type="XLORA", hidden_size=32, adapters={"0": "someone/adapter"}),
        "made of other adapters",
    ),
    "rank that fills the memory": (lambda folder: edit_config(folder, r=10**9), "tensors hold"),
    "rank of one layer": (lambda folder: edit_config(folder, rank_pattern={"q_proj": 10**9}), "tensors hold"),
    "rank of LoHa": (lambda folder: edit_config(folder, peft_type="LOHA", r=10**9), "tensors hold"),
    "rank of VeRA": (lambda folder: edit_config(folder, peft_type="VERA", r=10**7), "tensors hold"),
    "ranks as wide as one tensor": (
        lambda folder: [_change_weights(lambda weights: weights.update(wide=torch.zeros(10**5, 1)))(folder),
                        edit_config(folder, r=10**5)],
        "weights, and its tensors hold",
    ),
    "random numbers": (
        lambda folder: [_change_weights(lambda weights: weights.update(wide=torch.zeros(10**5, 9)))(folder),
                        edit_config(folder, peft_type="VERA", r=10**5)],
        "random numbers, too many",
    ),
    "rank of UniLoRA": (lambda folder: edit_config(folder, peft_type="UNILORA", r=10**9), "tensors hold"),
    "other rank": (lambda folder: edit_config(folder, r=2), "size mismatch"),
    "other modules": (lambda folder: edit_config(folder, target_modules=["nothing"]), "nothing"),
    "fewer modules": (lambda folder: edit_config(folder, target_modules=["q_proj"]), "has no place"),
    "more modules": (lambda folder: edit_config(folder, target_modules="all-linear"), "is missing"),
    "missing tensor": (_change_weights(lambda weights: weights.pop(LORA)), f"tensor {LORA} is missing"),
    "extra tensor": (_change_weights(lambda weights: weights.update(extra=torch.zeros(2))), "tensor extra has"),
    "NaN": (_change_weights(lambda weights: weights[LORA].fill_(float("nan"))), "NaN"),
    "infinity": (_change_weights(lambda weights: weights[LORA].fill_(float("inf"))), "infinity"),
    "whole numbers": (_change_weights(lambda weights: weights.update({LORA: weights[LORA].int()})), "torch.int32"),
    "complex": (_change_weights(lambda weights: weights.update({LORA: weights[LORA].cfloat()})), "torch.complex64"),
    "truth values": (_change_weights(lambda weights: weights.update({LORA: weights[LORA].bool()})), "torch.bool"),
    "endless expression": (lambda folder: edit_config(folder, target_modules=ENDLESS), "take more than"),
    "endless exclusion": (lambda folder: edit_config(folder, exclude_modules=ENDLESS), "take more than"),
    "endless pattern": (lambda folder: edit_config(folder, alpha_pattern={ENDLESS: 8}), "take more than"),
    **{
        f"many expressions: {option}": (
            lambda folder, option=option, given=given: edit_config(folder, **{option: given, "layers_to_transform": 0}),
            "patterns, and the model",
        )
        for option, given in {
            "rank_pattern": {f"x{i}": 2 for i in range(999)},
            "alpha_pattern": {f"x{i}": 2 for i in range(999)},
            "modules_to_save": [f"x{i}" for i in range(999)],
            "layers_pattern": [f"x{i}" for i in range(999)],
        }.items()
    },
    "no expression": (lambda folder: edit_config(folder, target_modules="(q_proj"), "expression is invalid"),
    "repeated layers": (lambda folder: edit_config(folder, layer_replication=[[0, 2]] * 3), "layer_replication"),
    "endless config": (lambda folder: edit_config(folder, layer_replication=[[0, 2]] * 10**6), "too long"),
    "cut off": (lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-99]), "cannot be merged"),
    "other model": (_other_model, "cannot be merged"),
    "a large tensor of one number": (
        lambda folder: [torch.save({**load_file(folder / FILE), "big": torch.zeros(1).expand(2**40)},
                                   folder / "adapter_model.bin"), (folder / FILE).unlink()],
        "is smaller than the tensors that it says it holds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_does_not_fit_is_one_clear_line(
    damage: str, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, expected = DAMAGE[damage]
    monkeypatch.setattr("dllm.models.expressions._SECONDS", 1)
    monkeypatch.setattr("dllm.models.adapters._FEW", 0)
    edit(adapter)
    message = refusal(base, adapter=adapter)
    assert str(adapter) in message
    assert expected in message


@pytest.mark.parametrize("index", [-1, 10**6])
def test_indices_outside_of_a_weight_are_refused(index: int, base: Path, tmp_path: Path) -> None:
    model: Any = peft.get_peft_model(random_llada().backbone, peft.ShiraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "own")
    weights = load_file(tmp_path / "own" / FILE)
    next(each for name, each in weights.items() if "indices" in name)[0, 0] = index
    save_file(weights, tmp_path / "own" / FILE, metadata={"format": "pt"})
    assert str(index) in refusal(base, adapter=tmp_path / "own")


def test_an_option_of_a_later_peft_is_told_where_it_is_set(base: Path, adapter: Path) -> None:
    edit_config(adapter, use_nothing=False)
    with warnings.catch_warnings(action="error", category=Notice):
        dllm.load(base, device="cpu", adapter=adapter)
    edit_config(adapter, use_magic=True)
    with pytest.warns(Notice, match="this peft does not know use_magic and ignores it; install a newer one"):
        dllm.load(base, device="cpu", adapter=adapter)


def tied() -> dllm.LanguageModel:
    lm = random_fast_dllm()
    lm.backbone.config.tie_word_embeddings = True
    lm.backbone.tie_weights()
    return lm


@pytest.mark.parametrize(
    ("make", "target", "module"),
    [
        (tied, "embed_tokens", "embed_tokens"),
        (tied, "lm_head", "lm_head"),
        (random_diffusion_gemma, r".*decoder.*\.q_proj", "q_proj"),
    ],
)
def test_one_for_a_weight_that_modules_share_is_refused(make: Maker, target: str, module: str, tmp_path: Path) -> None:
    """Merged, it would change the other modules, too."""
    base = save_folder(make(), tmp_path / "base")
    targets = target if "*" in target else ["q_proj", target]
    peft.get_peft_model(make().backbone, peft.LoraConfig(r=2, target_modules=targets)).save_pretrained(tmp_path / "own")
    assert f"{module} has its weight in common with another part" in refusal(base, adapter=tmp_path / "own")


def test_one_for_other_weights_of_a_model_with_a_tied_head_is_merged(tmp_path: Path) -> None:
    base = save_folder(tied(), tmp_path / "base")
    expected = save_adapter(tied, tmp_path / "adapter", trainable_token_indices=[3, 5])
    torch.testing.assert_close(logits(dllm.load(base, device="cpu", adapter=tmp_path / "adapter")), expected)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c", "tiny-llada", ""])
def test_an_adapter_that_is_none_is_named(name: str, base: Path) -> None:
    assert "adapter=" in refusal(base, adapter=name)


def test_it_is_not_said_to_misfit_where_memory_does_not_suffice(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("dllm.models.adapters._merge", merge)
    with pytest.raises(RuntimeError, match="allocate"):
        dllm.load(base, device="cpu", adapter=adapter)


def test_without_peft_it_says_what_to_install(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refusal(base, adapter=adapter)


def test_it_is_fetched_from_the_hub(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, expected = "0" * 40, logits(dllm.load(base, device="cpu", adapter=adapter))
    weights = load_file(adapter / FILE)
    (adapter / FILE).unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    edit_config(adapter, base_model_name_or_path="some/base", revision="main")
    for name, source in (("adapter", adapter), ("base", base)):
        repository = tmp_path / f"models--some--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(source, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for options in ({"name": base, "adapter": "some/adapter"}, {"name": "some/adapter"}):
        lm = dllm.load(**options, device="cpu")
        torch.testing.assert_close(logits(lm), expected)
        assert "some/adapter" in lm.name


class TestCommand:
    def test_generate_takes_it(self, tmp_path: Path) -> None:
        base = save_folder(random_llada(tokenizer=True), tmp_path / "base")
        save_adapter(lambda: random_llada(tokenizer=True), tmp_path / "a,b=c")
        texts = []
        for more in ([], [f"model.adapter={tmp_path / 'a,b=c'}"]):
            done = command("generate", f"model={base}", "model.device=cpu", "gen_length=16", *more)
            assert done.code == 0, done.err
            texts.append(done.out)
        assert texts[0] != texts[1]

    def test_one_that_is_not_there_is_one_line(self) -> None:
        done = command("generate", "model.adapter=./nowhere")
        assert done.code == 2
        assert done.err == (
            "dllm generate: error: model.adapter='./nowhere' is not a folder or hub id; check the spelling\n"
        )


@FAMILIES
def test_peft_wraps_a_loaded_model_as_a_causal_one(make: Maker, tmp_path: Path) -> None:
    expected = save_adapter(make, tmp_path / "adapter", task_type="CAUSAL_LM")
    lm = dllm.load(save_folder(make(), tmp_path / "base"), device="cpu")
    wrapped = peft.PeftModel.from_pretrained(lm.backbone, tmp_path / "adapter")
    torch.testing.assert_close(logits(wrapped), expected)
    # The layers are replaced within the model, so it decodes with the adapter as well.
    out = dllm.generate(lm, [[5, 6, 7]], "vanilla", gen_length=8)
    merged = dllm.load(tmp_path / "base", device="cpu", adapter=tmp_path / "adapter")
    assert out.sequences.tolist() == dllm.generate(merged, [[5, 6, 7]], "vanilla", gen_length=8).sequences.tolist()
    with pytest.raises(TypeError, match="labels"):
        wrapped(IDS, labels=IDS)
