"""`dllm adapt`: a causal model becomes one that denoises blocks, trained as it is decoded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file
from torch import Tensor

import dllm
from commands import Outcome, command
from dllm.files import BUNDLED
from dllm.scripts import adapt as application
from dllm.scripts import training
from dllm.scripts.app import rewrite
from dllm.scripts.tiny_models import as_block_diffusion
from dllm.tasks.tokenizer import build_tokenizer
from models import random_guide

TINY = [
    "batch_size=4", "compile=false", "autocast=null", "log_every=1", "checkpoint_every=3", "eval_problems=0", "steps=6",
    "warmup=1",
]  # fmt: skip
QUESTION = "Tom has 5 pens. He buys 7. He loses 2. How many pens does he have?"


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small causal model whose biases are not zero."""
    model = random_guide(len(build_tokenizer()), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("guide") / "small"
    model.save_pretrained(folder)
    return folder


def adapt(guide: Path, out: Path, *arguments: str) -> Outcome:
    return command("adapt", f"init={guide}", f"out={out}", *TINY, *arguments)


def succeed(guide: Path, out: Path, *arguments: str) -> Path:
    result = adapt(guide, out, *arguments)
    assert result.code == 0, result.err
    return out


def losses(out: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (out / "loss.csv").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def adapted(guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return succeed(guide, tmp_path_factory.mktemp("adapted") / "new" / "mine")


class TestData:
    @pytest.mark.parametrize("block_length", [1, 3, 4, 8])
    def test_each_block_of_the_answer_has_masks_whose_weights_sum_to_one(self, block_length: int) -> None:
        starts, rng = torch.arange(5, 25), torch.Generator().manual_seed(0)
        masked, weight = application.mask_blocks(starts, 21, block_length, rng)
        for row, start in enumerate(starts.tolist()):
            blocks = torch.arange(start, start + 21) // block_length
            for block in blocks.unique():
                inside = blocks == block
                assert masked[row][inside].any()
                assert float(weight[row][inside].sum()) == pytest.approx(1)
        assert torch.equal(masked, weight > 0)

    def test_every_number_of_masks_is_as_likely(self) -> None:
        masked, _ = application.mask_blocks(torch.full((4000,), 8), 4, 4, torch.Generator().manual_seed(0))
        counts = masked.sum(-1).bincount(minlength=5).tolist()
        assert counts[0] == 0
        assert all(abs(count - 1000) < 120 for count in counts[1:])
        assert all(abs(float(share) - 0.625) < 0.05 for share in masked.float().mean(0))

    def test_the_copies_attend_to_what_a_decode_sees(self) -> None:
        blocks, valid = torch.tensor([[0, 0, 1, 1, 2]]), torch.tensor([[False, True, True, True, True]])
        mask = application.two_copies(blocks, valid, 2)[0, 0].int().tolist()
        assert mask == [
            [1, 1, 0, 0, 0, 0, 0, 0],  # padding attends to itself
            [0, 1, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 0, 0, 0],
            [0, 1, 0, 0, 0, 1, 1, 0],  # the noisy copy
            [0, 1, 0, 0, 0, 1, 1, 0],
            [0, 1, 1, 1, 0, 0, 0, 1],
        ]

    def test_one_forward_predicts_every_block_as_a_decode_does(self, guide: Path, monkeypatch: Any) -> None:
        overrides = [f"init={guide}", "compile=false", "autocast=null", "batch_size=4", "canvas_lengths={52: 1}"]
        with initialize_config_module("dllm.conf", version_base="1.3"):
            cfg = compose("adapt", rewrite(overrides, "adapt"))
        data = application.BlockDiffusion(cfg)
        batch, mask = data.batches(), data.tokenizer.mask_token_id
        starts = batch.valid[:, :36].sum(-1)
        masked, weight = application.mask_blocks(starts, 52, 4, data.rng)
        seen, forward = [], data.model.forward

        def watch(**arguments: Any) -> Any:
            seen.append(forward(**arguments))
            return seen[-1]

        monkeypatch.setattr(data.model, "forward", watch)
        data._loss(batch.ids, batch.valid, masked, weight)
        found = seen[0].logits[:, -52:]
        assert starts.remainder(4).unique().numel() > 1  # blocks that begin in the prompt, and others
        for row, start in enumerate(starts.tolist()):
            ids = batch.ids[row][batch.valid[row].bool()]
            for block in range(start // 4, (len(ids) - 1) // 4 + 1):
                low, high = max(block * 4, start), min(block * 4 + 4, len(ids))
                canvas = torch.where(torch.arange(len(ids)) < high, ids, mask)
                canvas[low:high][masked[row, low - start : high - start]] = mask
                with torch.no_grad():
                    logits = forward(input_ids=canvas[None]).logits[0, low:high]
                torch.testing.assert_close(found[row, low - start : high - start], logits, atol=1e-4, rtol=1e-4)


class TestStart:
    def test_every_matrix_is_taken_over_and_heads_keep_their_size(self, guide: Path) -> None:
        source, words = load_file(guide / "model.safetensors"), build_tokenizer()
        model = as_block_diffusion(guide, str(guide), words, 8)
        own = model.state_dict()
        assert {name for name in own if name not in source} == {
            f"model.layers.{layer}.self_attn.{each}_norm.weight" for layer in (0, 1) for each in "qk"
        }
        assert {name for name in source if name not in own} == {name for name in source if name.endswith(".bias")}
        assert all(torch.equal(own[name], source[name]) for name in own if name in source)
        assert (model.config.block_size, model.config.mask_token_id) == (8, words.mask_token_id)
        draw = torch.randn((4000, 32), generator=torch.Generator().manual_seed(0))
        for each in "qk":
            weight, bias = (source[f"model.layers.0.self_attn.{each}_proj.{part}"] for part in ("weight", "bias"))
            size = (draw @ weight.T + bias).square().mean().sqrt()
            norm = own[f"model.layers.0.self_attn.{each}_norm.weight"]
            assert float(norm[0]) == pytest.approx(float(size), rel=0.05)

    def test_a_model_of_another_kind_or_vocabulary_is_refused(self, guide: Path, tmp_path: Path) -> None:
        random_guide(64, dtype=torch.float32).save_pretrained(tmp_path / "other")
        for init, named in (
            (BUNDLED / "tiny-llada", "it has a model of type llada"),
            (tmp_path / "other", "has 64 tokens, not the 144 of the word problems"),
        ):
            result = adapt(init, tmp_path / "out")
            assert (result.code, result.err.count("\n")) == (2, 1)
            assert f"init='{init}'" in result.err
            assert named in result.err


class TestTraining:
    def test_it_learns(self, guide: Path, tmp_path: Path) -> None:
        more = ["steps=60", "batch_size=8", "checkpoint_every=60", "canvas_lengths={52: 1}"]
        found = losses(succeed(guide, tmp_path / "out", *more))
        assert sum(found[-5:]) < 0.6 * sum(found[:5])

    def test_the_result_decodes_in_its_blocks(self, adapted: Path) -> None:
        lm = dllm.load(adapted, device="cpu")
        assert (lm.backbone.config.model_type, lm.backbone.config.block_size) == ("sdar", 4)
        exact, cached = (dllm.generate(lm, QUESTION, cache=cache, gen_length=16) for cache in ("none", "block"))
        assert torch.equal(exact.completions, cached.completions)
        assert exact.nfe.item() > 0

    def test_a_resumed_run_ends_as_an_uninterrupted_one(
        self, guide: Path, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step, out = training.Trainer.train_step, tmp_path / "out"

        def interrupt(trainer: training.Trainer) -> Tensor:
            if trainer.step == 4:
                raise KeyboardInterrupt
            return step(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(training.Trainer, "train_step", interrupt)
            assert adapt(guide, out).code == 130
        assert not same(out, adapted)
        succeed(guide, out)
        assert same(out, adapted)
        assert losses(out) == losses(adapted)

    def test_the_training_of_another_model_is_not_resumed(self, guide: Path, adapted: Path, tmp_path: Path) -> None:
        out = shutil.copytree(adapted, tmp_path / "copy")
        for change in ("block_length=8", "seed=2"):
            result = adapt(guide, out, change)
            assert result.code == 2
            assert f"this run has {change}" in result.err

    def test_the_training_of_other_initial_weights_is_not_resumed(
        self, guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        init, out = shutil.copytree(guide, tmp_path / "init"), tmp_path / "out"
        save = training.Trainer.save

        def interrupt(trainer: training.Trainer) -> None:
            save(trainer)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(training.Trainer, "save", interrupt)
            assert adapt(init, out).code == 130
        random_guide(len(build_tokenizer()), seed=1, dtype=torch.float32).save_pretrained(init)
        said = (
            f"dllm adapt: error: out='{out}' was trained with other contents of init='{init}'; give another out, or "
            f"remove {out / 'state.pt'} to train from scratch\n"
        )
        result = adapt(init, out)
        assert (result.code, result.err) == (2, said)
        (out / "state.pt").unlink()
        assert same(succeed(init, out), succeed(init, tmp_path / "new"))
        shutil.copytree(guide, init, dirs_exist_ok=True)
        before = (out / "model.safetensors").read_bytes()
        result = adapt(init, out)
        assert (result.code, result.err) == (2, said)
        assert (out / "model.safetensors").read_bytes() == before

    def test_a_state_of_an_earlier_version_is_resumed(self, guide: Path, adapted: Path, tmp_path: Path) -> None:
        out = shutil.copytree(adapted, tmp_path / "copy")
        state = torch.load(out / "state.pt", weights_only=True)
        del state["contents"]
        torch.save(state, out / "state.pt")
        assert same(succeed(guide, out), adapted)

    def test_its_card_says_what_it_is_and_only_the_model_is_published(
        self, guide: Path, adapted: Path, tmp_path: Path
    ) -> None:
        out = shutil.copytree(adapted, tmp_path / "copy")
        succeed(guide, out, f"publish={tmp_path}/tiny-block", "eval_problems=2")
        card = (tmp_path / "tiny-block" / "README.md").read_text()
        assert "SDAR architecture" in card
        assert "`dllm adapt init=outputs/small steps=6 batch_size=4 " in card
        assert "On 2 problems of seed 1000001, 64 positions, with cache=block:" in card
        assert "| vanilla, 1 token per step | " in card
        assert "arch:" not in card
        names = {path.name for path in (tmp_path / "tiny-block").iterdir()}
        assert names == {path.name for path in out.iterdir()} - {"state.pt", "loss.csv", "adapt.yaml"}
        assert not any("/" in str(value) for value in json.loads((out / "config.json").read_text()).values())

    def test_models_of_other_commands_are_not_written_over(self, guide: Path, tmp_path: Path) -> None:
        for option in ("out", "publish"):
            folder = shutil.copytree(BUNDLED / "tiny-llada", tmp_path / option)
            result = command("adapt", f"init={guide}", f"out={tmp_path}/new", f"{option}={folder}", *TINY)
            assert (result.code, result.err.count("\n")) == (2, 1)
            assert "is of no model of dllm adapt; give another folder" in result.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["init=/nope"], "init='/nope' is not a folder"),
        (["block_length=0"], "block_length=0 is out of range"),
        (["block_length=x"], "block_length='x'"),
        (["steps=0"], "steps=0 is out of range"),
        (["batch_size=0"], "batch_size=0"),
        (["prompt_length=9"], "prompt_length=9 is out of range"),
        (["matrix_lr=-1"], "matrix_lr=-1 is out of range"),
        (["device=nonsense"], "device='nonsense' is not available here"),
        (["device=meta"], "device='meta' is not available here"),
        (["device=hpu"], "device='hpu' is not available here"),
        (["autocast=int8"], "unknown autocast='int8'"),
        (["stepz=3"], "unknown option 'stepz' (did you mean steps?); expected one of "),
        (["publish=/dev/null/x"], "publish='/dev/null/x' cannot be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], named: str) -> None:
    result = command("adapt", f"out={tmp_path}/out", *TINY, *arguments)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result.err
    assert result.err.startswith("dllm adapt: error: ")
    assert named in result.err
    assert not (tmp_path / "out" / "model.safetensors").exists()
