"""`dllm.load`: what it accepts, what it makes of it, and the one line it says when something is wrong."""

from __future__ import annotations

import inspect
import json
import runpy
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, TorchAoConfig
from transformers.utils import logging

from dllm.models import DreamModel, LLaDAModelLM, loading
from dllm.models.loading import LanguageModel, checkpoint_folder, load
from dllm.resolve import names, options_of
from dllm.tasks.tokenizer import build_tokenizer
from models import random_llada, save_folder

CHECKPOINTS = pytest.mark.parametrize("checkpoint", ["llada-rand-a", "dream-rand-a"])
Edit = Callable[[Path], None]
TENSOR = "model.transformer.blocks.1.q_proj.weight"
IDS = torch.arange(12)[None]


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A private copy of a LLaDA checkpoint."""
    return Path(shutil.copytree(golden / "llada-rand-a", tmp_path / "checkpoint"))


@torch.no_grad()
def logits(model: LanguageModel | torch.nn.Module) -> Tensor:
    backbone = model.backbone if isinstance(model, LanguageModel) else model
    return backbone(IDS.to(backbone.device)).logits


def edit_config(**entries: Any) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def write(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content) and None


def remove(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000]) and None


def shard(folder: Path) -> None:
    load(folder, device="cpu").backbone.save_pretrained(folder / "shards", max_shard_size="200KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "shards").iterdir():
        file.replace(folder / file.name)
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def error_of(name: str | Path, **options: Any) -> str:
    """The message of the error that loading must raise: one line, with no other error behind it."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # every caller looks at the message
        load(name, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return str(caught.value)


class TestFormats:
    @pytest.mark.parametrize("convert", [shard, pickle])
    def test_every_weights_format_gives_the_same_logits(self, golden: Path, folder: Path, convert: Edit) -> None:
        convert(folder)
        assert torch.equal(logits(load(folder, device="cpu")), logits(load(golden / "llada-rand-a", device="cpu")))

    @CHECKPOINTS
    def test_model_type_chooses_the_family(self, golden: Path, checkpoint: str) -> None:
        family = LLaDAModelLM if checkpoint.startswith("llada") else DreamModel
        lm = load(golden / checkpoint, device="cpu")
        assert type(lm.backbone) is family
        assert not lm.backbone.training
        assert lm.tokenizer is None

    @CHECKPOINTS
    def test_a_bfloat16_checkpoint_survives_loading_and_saving(
        self, golden: Path, checkpoint: str, tmp_path: Path
    ) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        load(golden / checkpoint, device="cpu", dtype="bfloat16").backbone.save_pretrained(first)
        again = load(first, device="cpu").backbone
        assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
        again.save_pretrained(second)
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        exact = logits(load(golden / checkpoint, device="cpu"))
        error = (logits(load(first, device="cpu", dtype="float32")) - exact).abs().max()
        assert 0 < error < 0.05 * exact.abs().max()

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            ("auto", torch.float32),
            ("float64", torch.float64),
            ("bfloat16", torch.bfloat16),
            (torch.float16, torch.float16),
        ],
    )
    def test_dtype_is_that_of_the_weights_and_the_logits(
        self, golden: Path, dtype: str | torch.dtype, expected: torch.dtype
    ) -> None:
        lm = load(golden / "llada-rand-a", device="cpu", dtype=dtype)
        assert lm.backbone.dtype == expected
        assert logits(lm).dtype == expected
        assert torch.get_default_dtype() == torch.float32

    @CHECKPOINTS
    @pytest.mark.filterwarnings("error")
    def test_loading_prints_nothing_and_leaves_logging_as_it_was(
        self, golden: Path, checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        folder = Path(shutil.copytree(golden / checkpoint, tmp_path / "checkpoint"))
        build_tokenizer().save_pretrained(folder)
        logging.set_verbosity_warning()
        logging.enable_progress_bar()
        load(folder, device="cpu")
        edit_weights(lambda weights: weights.popitem())(folder)
        error_of(folder)
        assert capfd.readouterr() == ("", "")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, True)


class TestNames:
    def test_a_bundled_name_wins_over_a_folder_of_the_same_name(
        self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(golden / "dream-rand-a", tmp_path / "bundled" / "tiny-dream")
        shutil.copytree(golden / "llada-rand-a", tmp_path / "tiny-dream")
        monkeypatch.setattr(loading, "BUNDLED", tmp_path / "bundled")
        monkeypatch.chdir(tmp_path)
        lm = load("tiny-dream", device="cpu")
        assert isinstance(lm.backbone, DreamModel)
        assert lm.name == "tiny-dream"
        assert isinstance(load("./tiny-dream", device="cpu").backbone, LLaDAModelLM)

    def test_a_hub_id_loads_from_the_cache_without_a_connection(
        self, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = "0" * 40
        repository = tmp_path / "models--GSAI-ML--LLaDA-1.5"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(golden / "llada-rand-a", repository / "snapshots" / commit)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        expected = logits(load(golden / "llada-rand-a", device="cpu"))
        for name in ("GSAI-ML/LLaDA-1.5", "llada-1.5"):
            lm = load(name, device="cpu", revision="main")
            assert lm.name == name
            assert torch.equal(logits(lm), expected)

    def test_an_unreachable_hub_id_is_one_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for name in ("GSAI-ML/LLaDA-8B-Instruct", "llada-8b-instruct", "outputs/no-such-folder"):
            message = error_of(name)
            assert f"name={name!r}" in message
            assert "connection" in message

    @pytest.mark.parametrize("name", ["", "tiny-lama", "./no/such/folder", "/no/such/folder", "a/b/c"])
    def test_an_unknown_name_is_answered_with_the_known_ones(self, name: str) -> None:
        message = error_of(name)
        assert f"name={name!r}" in message
        assert "tiny-llada" in message
        assert "llada-8b-instruct" in message

    def test_a_revision_of_a_folder_is_refused(self, folder: Path) -> None:
        assert "revision='main'" in error_of(folder, revision="main")

    def test_any_bundled_folder_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "tiny-guide").mkdir()
        monkeypatch.setattr(loading, "BUNDLED", tmp_path)
        assert checkpoint_folder("tiny-guide") == tmp_path / "tiny-guide"

    def test_model_configs_mirror_the_arguments_of_load(self) -> None:
        expected = {p.name: p.default for p in inspect.signature(load).parameters.values() if p.name != "name"}
        assert {"tiny-llada", "tiny-dream", "dream-7b-instruct", "custom"} <= set(names("model"))
        for name in names("model"):
            options = options_of("model", name)
            assert (options.pop("path") == "???") == (name == "custom")
            assert options == expected | {"pack": "auto"}  # commands neither save nor train


class TestNoForeignCode:
    @pytest.fixture
    def trapped(self, folder: Path, tmp_path: Path) -> tuple[Path, Path]:
        """A checkpoint whose code leaves a file behind when executed, and that file."""
        trace = tmp_path / "executed"
        code = f"open({str(trace)!r}, 'w').close()\nclass LLaDAConfig: ...\nclass LLaDAModelLM: ...\nclass T: ...\n"
        for file in ("configuration_llada.py", "modeling_llada.py", "tokenization_llada.py"):
            (folder / file).write_text(code)
        build_tokenizer().save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        foreign = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tokenization_llada.T", None]}}
        path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
        assert "auto_map" in json.loads((folder / "config.json").read_text())
        return folder, trace

    def test_load_never_executes_it(self, trapped: tuple[Path, Path]) -> None:
        folder, trace = trapped
        lm = load(folder, device="cpu")
        assert not trace.exists()
        assert type(lm.backbone) is LLaDAModelLM
        assert lm.tokenizer is not None
        runpy.run_path(str(folder / "modeling_llada.py"))
        assert trace.exists(), "the trap would not have noticed"

    @pytest.mark.parametrize("trust", [None, False])
    def test_auto_classes_take_the_registered_family_instead(
        self, trapped: tuple[Path, Path], trust: bool | None
    ) -> None:
        folder, trace = trapped
        assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)).__module__ == "dllm.models.llada"
        for auto in (AutoModel, AutoModelForMaskedLM):
            assert type(auto.from_pretrained(folder, trust_remote_code=trust)) is LLaDAModelLM
        assert not trace.exists()


def _shard_and_remove_one(folder: Path) -> None:
    shard(folder)
    min(folder.glob("model-*.safetensors")).unlink()


def _pickle_and_truncate(folder: Path) -> None:
    pickle(folder)
    truncate("pytorch_model.bin")(folder)


def _poison(value: float) -> Edit:
    return edit_weights(lambda weights: weights[TENSOR][3].fill_(value))


DAMAGE: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no config": (remove("config.json"), ("config.json", "whole checkpoint")),
    "config is not JSON": (write("config.json", "{oops"), ("config.json is not JSON", "again")),
    "config is no object": (write("config.json", "[1]"), ("config.json holds a JSON list",)),
    "other architecture": (edit_config(model_type="gpt2"), ("model_type='gpt2'", "llada", "Dream")),
    "no architecture": (edit_config(model_type=None), ("model_type='None'", "llada")),
    "other kind of block": (edit_config(block_type="sequential"), ("block_type='sequential'", "'llama'")),
    "heads do not divide": (edit_config(n_heads=3), ("d_model=64", "n_heads=3")),
    "no layers": (edit_config(n_layers=0), ("n_layers=0",)),
    "no size": (edit_config(mlp_hidden_size=0), ("mlp_hidden_size=0", "at least 1")),
    "no rope base": (edit_config(rope_theta=-1.0), ("rope_theta=-1.0", "positive")),
    "mask outside the vocabulary": (edit_config(mask_token_id=256), ("mask_token_id=256", "0 to 255")),
    "eos outside the vocabulary": (edit_config(eos_token_id=[254, -1]), ("eos_token_id=-1", "0 to 255")),
    "no eos": (edit_config(eos_token_id=None), ("no eos_token_id",)),
    "no weights": (remove("model.safetensors"), ("no weights", "model.safetensors")),
    "truncated weights": (truncate("model.safetensors"), ("model.safetensors is damaged", "again")),
    "weights are no weights": (
        write("model.safetensors", "version https://git-lfs"),
        ("model.safetensors is damaged",),
    ),
    "truncated pickle": (_pickle_and_truncate, ("pytorch_model.bin is damaged",)),
    "missing shard": (_shard_and_remove_one, ("model-00001-of", "is missing", "again")),
    "missing tensor": (edit_weights(lambda weights: weights.pop(TENSOR)), (TENSOR, "is missing")),
    "extra tensor": (
        edit_weights(lambda weights: weights.update(extra=torch.zeros(2))),
        ("tensor extra", "not part of LLaDAModelLM"),
    ),
    "misshaped tensor": (
        edit_weights(lambda weights: weights.update({TENSOR: torch.zeros(2, 3)})),
        (TENSOR, "another shape", "config.json"),
    ),
    "another model's config": (edit_config(n_layers=4), ("blocks.3.", "is missing")),
    "NaN": (_poison(float("nan")), (TENSOR, "NaN")),
    "infinity": (_poison(float("inf")), (TENSOR, "infinity")),
    "generation config is not JSON": (write("generation_config.json", "{"), ("generation_config.json is not JSON",)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_line(folder: Path, damage: str) -> None:
    edit, expected = DAMAGE[damage]
    edit(folder)
    message = error_of(folder)
    for part in expected:
        assert part in message


class TestOptions:
    @pytest.mark.parametrize(
        "options",
        [
            {"dtype": "int8"},
            {"dtype": torch.int8},
            {"device": "warp"},
            {"device": "cuda:99"},
            {"device": "meta"},
            {"device": "hpu"},
            {"device": "privateuseone"},
            {"device": "cpu", "device_map": "auto"},
            {"device_map": "everywhere"},
            {"attn_implementation": "flash_attention_2"},
        ],
        ids=str,
    )
    def test_a_wrong_option_is_named(self, golden: Path, options: dict[str, Any]) -> None:
        message = error_of(golden / "llada-rand-a", **options)
        for name, value in options.items():
            assert name in message
            assert str(value) in message

    @pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
    def test_device_map_places_the_model(self, golden: Path, device_map: str | dict[str, str]) -> None:
        lm = load(golden / "dream-rand-a", device_map=device_map)
        expected = logits(load(golden / "dream-rand-a", device=lm.device))
        torch.testing.assert_close(logits(lm), expected)
        if device_map != "auto":
            assert lm.device.type == "cpu"

    def test_a_model_split_between_memory_and_disk_computes_the_same(self, golden: Path) -> None:
        device_map = {f"model.transformer.{part}": "cpu" for part in ("wte", "blocks.0", "blocks.2", "ln_f", "ff_out")}
        lm = load(golden / "llada-rand-a", device_map=device_map | {"model.transformer.blocks.1": "disk"})
        assert lm.backbone.get_parameter(TENSOR).is_meta
        torch.testing.assert_close(logits(lm), logits(load(golden / "llada-rand-a", device="cpu")))

    def test_the_device_is_where_the_weights_are(self, golden: Path) -> None:
        lm = load(golden / "llada-rand-a")
        assert lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert {parameter.device for parameter in lm.backbone.parameters()} == {lm.device}

    def test_a_loaded_model_can_be_moved_and_cast(self, golden: Path) -> None:
        lm = load(golden / "llada-rand-a", device="cpu")
        expected = logits(lm)
        torch.testing.assert_close(logits(lm.backbone.to("cpu", torch.float64)).float(), expected, atol=1e-4, rtol=0)


class TestSpecialTokens:
    @pytest.fixture
    def chatty(self, folder: Path) -> Path:
        """A checkpoint whose tokenizer has LLaDA's end-of-turn token."""
        tokenizer = build_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|im_end|>"]})
        tokenizer.save_pretrained(folder)
        return folder

    def test_end_of_turn_counts_as_end_of_text(self, chatty: Path) -> None:
        lm = load(chatty, device="cpu")
        assert lm.backbone.eos_token_ids == (254, lm.tokenizer.convert_tokens_to_ids("<|eot_id|>"))

    def test_without_such_a_token_only_the_config_counts(self, folder: Path) -> None:
        assert load(folder, device="cpu").backbone.eos_token_ids == (254,)
        build_tokenizer().save_pretrained(folder)
        assert load(folder, device="cpu").backbone.eos_token_ids == (254,)

    def test_the_generation_config_adds_ids_and_the_config_stays_first(self, chatty: Path) -> None:
        edit_config(eos_token_id=[250, 254])(chatty)
        (chatty / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 254]}))
        lm = load(chatty, device="cpu")
        turn = lm.tokenizer.convert_tokens_to_ids("<|eot_id|>")
        assert lm.backbone.eos_token_ids == (250, 254, 3, turn)

    def test_extra_ids_belong_to_one_model_and_are_not_saved(self, chatty: Path, golden: Path, tmp_path: Path) -> None:
        lm = load(chatty, device="cpu")
        assert len(lm.backbone.eos_token_ids) == 2
        assert load(golden / "llada-rand-a", device="cpu").backbone.eos_token_ids == (254,)
        lm.backbone.save_pretrained(tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["eos_token_id"] == 254

    def test_the_tokenizer_learns_the_mask_from_the_config(self, chatty: Path) -> None:
        token = build_tokenizer().convert_ids_to_tokens(7)
        edit_config(mask_token_id=7)(chatty)
        lm = load(chatty, device="cpu")
        assert lm.tokenizer.mask_token == token
        assert lm.tokenizer.mask_token_id == lm.backbone.mask_token_id == 7


class TestEcosystem:
    @CHECKPOINTS
    def test_a_saved_model_loads_through_auto_classes_with_the_same_logits(
        self, golden: Path, checkpoint: str, tmp_path: Path
    ) -> None:
        lm = load(golden / checkpoint, device="cpu")
        lm.backbone.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(lm))
        published = json.loads((golden / checkpoint / "config.json").read_text())
        saved = json.loads((tmp_path / "config.json").read_text())
        # Keys of transformers' own come and go with its version; the architecture's stay.
        own = {"torch_dtype", "transformers_version", "use_cache", "rope_scaling"}
        assert {key: saved[key] for key in published if key not in own} == {
            key: value for key, value in published.items() if key not in own
        }

    @CHECKPOINTS
    def test_lora_starts_at_the_model_trains_and_loads_again(
        self, golden: Path, checkpoint: str, tmp_path: Path
    ) -> None:
        peft = pytest.importorskip("peft")
        base = logits(load(golden / checkpoint, device="cpu"))
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"])
        model = peft.get_peft_model(load(golden / checkpoint, device="cpu").backbone, config)
        torch.testing.assert_close(logits(model), base)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(IDS).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        trained = logits(model)
        assert (trained - base).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(load(golden / checkpoint, device="cpu").backbone, tmp_path)
        torch.testing.assert_close(logits(again), trained)
        assert again.eos_token_ids == model.base_model.model.eos_token_ids

    @CHECKPOINTS
    def test_a_quantisation_config_is_applied_and_a_quantised_checkpoint_loads(
        self, golden: Path, checkpoint: str, tmp_path: Path
    ) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        model = AutoModel.from_pretrained(golden / checkpoint, dtype=torch.bfloat16, quantization_config=config)
        exact = logits(load(golden / checkpoint, device="cpu"))
        error = (logits(model).float() - exact).abs().max()
        assert 0 < error < 0.1 * exact.abs().max()
        if int(transformers.__version__.split(".")[0]) >= 5:  # older ones cannot save torchao's int8 weights
            model.save_pretrained(tmp_path)
            assert torch.equal(logits(load(tmp_path, device="cpu")), logits(model))


@pytest.mark.parametrize(
    "device_map", [{}, {"": "meta"}, {"": "disk"}, {"": "cuda:99"}, {"": 99}, {5: "cpu"}, 5], ids=repr
)
def test_a_device_map_that_cannot_be_followed_is_refused(device_map: Any) -> None:
    with pytest.raises(ValueError, match=r"^device_map=.*(assigns no part to a device|is not available here)"):
        load("tiny-llada", device_map=device_map)


def test_a_dtype_that_is_not_computed_in_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^dtype=torch.float8_e4m3fn is not supported for weights; use float16"):
        load("tiny-llada", dtype=torch.float8_e4m3fn)


def test_a_tokenizer_with_tokens_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = save_folder(random_llada(tokenizer=True), tmp_path)
    own = json.loads((folder / "tokenizer.json").read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    token = {"content": "<extra>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    own["added_tokens"].append({"id": rows, "single_word": False, **token})
    (folder / "tokenizer.json").write_text(json.dumps(own))
    with pytest.raises(
        ValueError, match=f"the tokenizer gives '<extra>' the id .*, and this model's ids are 0 to {rows - 1}"
    ):
        load(folder)


def test_a_special_token_of_its_own_file_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = save_folder(random_llada(tokenizer=True), tmp_path)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sep_token": "<sep>"}))
    with pytest.raises(ValueError, match=f"the tokenizer gives '<sep>' the id {rows}, and this model's"):
        load(folder)


@pytest.mark.parametrize(
    ("method", "settings", "packages"),
    [
        ("awq", {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, "gptqmodel"),
        ("bitsandbytes", {"load_in_4bit": True}, "bitsandbytes"),
        ("bitsandbytes", {"load_in_8bit": True}, "bitsandbytes"),
        ("compressed-tensors", {"config_groups": {}}, "compressed-tensors"),
        ("gptq", {"bits": 4}, "optimum and gptqmodel"),
        ("hqq", {"quant_config": {}}, "hqq"),
        ("quanto", {"weights": "int8"}, "optimum-quanto"),
        ("torchao", {"quant_type": {"default": "int8_weight_only"}}, "torchao"),
    ],
)
def test_the_packages_that_quantised_weights_need_are_named(
    method: str, settings: dict[str, Any], packages: str, tmp_path: Path
) -> None:
    modules = {"quanto": "optimum.quanto", "gptq": "optimum"}
    module = modules.get(method, packages.replace("-", "_"))
    if find_spec(module.partition(".")[0]) is not None:
        pytest.skip(f"{module} is installed")
    folder = save_folder(random_llada(), tmp_path)
    edit_config(quantization_config={"quant_method": method, **settings})(folder)
    with pytest.raises(ValueError, match=f"quantised with {method}, .*; install {packages}, or use the model it was"):
        load(folder)


def test_quantised_weights_that_cannot_be_used_here_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_folder(random_llada(), tmp_path)
    edit_config(quantization_config={"quant_method": "gptq", "bits": 4})(folder)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("No GPU found. A GPU is needed for quantization.\nAnd more")

    monkeypatch.setattr(LLaDAModelLM, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"quantised with gptq, which cannot be used here \(No GPU found\."):
        load(folder)


def test_a_mask_is_no_end_of_turn(tmp_path: Path) -> None:
    backbone: Any = SimpleNamespace(end_of_turn=("<|eot_id|>", "<|im_end|>"), mask_token_id=7)
    tokenizer: Any = SimpleNamespace(get_added_vocab=lambda: {"<|eot_id|>": 7, "<|im_end|>": 5})
    assert loading._extra_eos(backbone, tokenizer, tmp_path) == (5,)
