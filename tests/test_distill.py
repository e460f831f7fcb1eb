"""`dllm distill`: certainty-forcing distillation learns, resumes, and gives an adapter that decodes in fewer steps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import dllm
import dllm.scripts.distill
from commands import Outcome, command
from dllm.distillation import Forcing, answer_logits, draw_masks, forcing_loss
from dllm.files import write_whole
from dllm.samplers import EntropyThreshold
from dllm.scripts import training
from dllm.tasks import word_problems
from dllm.tasks.tokenizer import build_tokenizer
from models import random_diffusion_gemma, random_dream, random_llada, random_sdar, save_folder

pytest.importorskip("peft")

Maker = Callable[..., dllm.LanguageModel]
FAMILIES = pytest.mark.parametrize("make", [random_llada, random_dream])
SMALL = [
    "prompts=6", "batch_size=4", "gen_length=12", "block_length=8", "steps=6", "train_batch_size=4", "rank=4",
    "warmup=1", "log_every=1", "checkpoint_every=3", "autocast=null", "eval_problems=0", "model.device=cpu",
]  # fmt: skip
QUESTIONS = [problem.question for problem in word_problems.problems(6, 2)]


def folder_of(make: Maker, place: Path) -> Path:
    return save_folder(make(tokenizer=True, max_length=128, dtype=torch.float32, sharpness=3.0), place)


def distil(model: Path, out: Path, *arguments: str) -> Outcome:
    return command("distill", f"model={model}", f"out={out}", *SMALL, *arguments)


def succeed(model: Path, out: Path, *arguments: str) -> Path:
    result = distil(model, out, *arguments)
    assert result.code == 0, result.err
    return out


def losses(out: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (out / "loss.csv").read_text().splitlines()]


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(random_llada, tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def distilled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return succeed(model, tmp_path_factory.mktemp("distilled") / "new" / "mine")


class TestLoss:
    def test_every_token_of_the_drawn_block_is_a_target_of_one_copy(self) -> None:
        blocks, ends = torch.arange(20).expand(400, 20) // 8, torch.tensor([3, 9, 15, 19] * 100)
        masked, targets = draw_masks(blocks, ends, 0.5, torch.Generator().manual_seed(0))
        first, second = targets.chunk(2)
        assert not (first & second).any()
        drawn = set()
        for row, inside in enumerate(first | second):
            block = int(blocks[row][inside][0])
            drawn.add((int(ends[row]), block))
            assert inside.tolist() == (blocks[row] == block).tolist()
            for mask, target in ((masked[row], first[row]), (masked[row + 400], second[row])):
                assert torch.equal(mask, target | (blocks[row] > block))
        # None after the end of the answer, all before it.
        assert drawn == {(end, block) for end in (3, 9, 15, 19) for block in range(end // 8 + 1)}
        assert abs(float(first.sum() / (first | second).sum()) - 0.5) < 0.05

    def test_a_random_share_masks_anything_from_few_to_all(self) -> None:
        blocks = torch.zeros((300, 16), dtype=torch.long)
        _, targets = draw_masks(blocks, torch.full((300,), 15), None, torch.Generator().manual_seed(0))
        assert {0, 4, 8, 12, 16} <= set(targets[:300].sum(-1).tolist())

    def test_it_is_cross_entropy_and_the_entropy_of_what_is_right(self) -> None:
        draw = torch.Generator().manual_seed(0)
        logits = torch.randn((4, 6, 9), generator=draw, dtype=torch.float64)
        tokens = torch.where(torch.rand((4, 6), generator=draw) < 0.5, logits.argmax(-1), 3)
        targets = torch.rand((4, 6), generator=draw) < 0.6
        cross, entropy = forcing_loss(logits, targets, tokens, Forcing(temperature=0.5))
        expected = [0.0, 0.0]
        for rows in (range(2), range(2, 4)):
            found: tuple[list[float], list[float]] = ([], [])
            for row in rows:
                for place in range(6):
                    if targets[row, place]:
                        own, token = logits[row, place], int(tokens[row, place])
                        found[0].append(-float(own.log_softmax(-1)[token]))
                        if int(own.argmax()) == token:
                            p = (own / 0.5).softmax(-1)
                            found[1].append(-float((p * p.log()).sum()))
            expected = [total + sum(each) / max(1, len(each)) for total, each in zip(expected, found, strict=True)]
        assert [float(cross), float(entropy)] == pytest.approx(expected)

    def test_without_targets_it_is_zero(self) -> None:
        nothing = torch.zeros((2, 4), dtype=torch.bool)
        cross, entropy = forcing_loss(torch.randn(2, 4, 5), nothing, torch.zeros((2, 4), dtype=torch.long), Forcing())
        assert (float(cross), float(entropy)) == (0, 0)

    @pytest.mark.parametrize("make", [random_llada, random_dream, random_sdar])
    @torch.no_grad()
    def test_the_logits_are_those_of_a_decode(self, make: Maker) -> None:
        lm, prompts = make(), [[5, 6, 7], [8]]
        seen: list[Any] = []
        dllm.generate(lm, prompts, gen_length=8, callback=lambda step: seen.append(step.tokens.copy()), batch_size=2)
        mask, eos = lm.backbone.mask_token_id, lm.backbone.eos_token_ids[0]
        rows = [[*([eos] * (3 - len(prompt))), *prompt, *[mask] * 8] for prompt in prompts]
        valid = torch.tensor([[0] * (3 - len(prompt)) + [1] * (len(prompt) + 8) for prompt in prompts])
        logits = answer_logits(lm.backbone, torch.tensor(rows), valid, 3, lm.backbone.pattern)
        logits[..., mask] = -torch.inf
        for row in range(2):
            first = torch.from_numpy(seen[0][row, -8:])
            place = int((first != mask).nonzero()[0])
            assert int(logits[row, place].argmax()) == int(first[place])


class TestTraining:
    @FAMILIES
    def test_the_loss_falls_the_certainty_rises_and_the_steps_become_fewer(self, make: Maker, tmp_path: Path) -> None:
        model = folder_of(make, tmp_path / "model")
        more = ["steps=60", "rate=0.01", "rank=8", "checkpoint_every=60", "mask_ratio=null"]
        out = succeed(model, tmp_path / "out", *more)
        found = losses(out)
        assert sum(found[-10:]) < 0.7 * sum(found[:10])
        before, after = (dllm.load(model, device="cpu", adapter=adapter) for adapter in (None, out))
        entropy, nfe = [], []
        for lm in (before, after):
            options: dict[str, Any] = {"gen_length": 12, "block_length": 8, "stop_at_eos": False}
            result = dllm.generate(lm, QUESTIONS, EntropyThreshold(0.5), **options)
            ids, width = result.sequences.clone(), result.sequences.shape[1] - 12
            ids[:, width:] = lm.backbone.mask_token_id
            with torch.no_grad():
                logits = answer_logits(lm.backbone, ids, result.attention_mask.long(), width)[:, :8]
            entropy.append(float(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()))
            nfe.append(float(result.nfe.double().mean()))
        assert entropy[1] < 0.8 * entropy[0]
        assert nfe[1] < nfe[0]

    def test_the_adapter_changes_a_decode(self, model: Path, distilled: Path) -> None:
        plain, adapted = (dllm.load(model, device="cpu", adapter=adapter) for adapter in (None, distilled))
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            assert not torch.allclose(plain.backbone(ids).logits, adapted.backbone(ids).logits, atol=1e-4)
        result = command(
            "generate", f"model={model}", f"model.adapter={distilled}", "model.device=cpu", "gen_length=8",
            f"prompt={QUESTIONS[0]}",
        )  # fmt: skip
        assert result.code == 0, result.err

    def test_the_adapter_is_the_same_in_each_process(self, distilled: Path) -> None:
        own = json.loads((distilled / "adapter_config.json").read_text())["target_modules"]
        assert own == sorted(own) and len(own) > 3

    def test_the_adapter_names_its_base(self, model: Path, distilled: Path) -> None:
        config = json.loads((distilled / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(model)
        assert dllm.load(distilled, device="cpu").adapter == distilled

    def test_its_card_says_what_it_is(self, model: Path, distilled: Path) -> None:
        card = (distilled / "README.md").read_text()
        assert f"A LoRA of rank 4 for {model}, distilled from {model}" in card
        assert f"model.adapter={distilled}" in card
        assert f"`dllm distill model={model} prompts=6 batch_size=4 " in card
        assert "6 steps of 4 prompts, out of 6 (dllm.tasks.word_problems, seed 2)" in card
        assert "entropy_weight: 2.0" in card
        assert "Not measured." in card

    def test_it_is_measured_before_and_after_on_other_problems(self, model: Path, tmp_path: Path) -> None:
        # The same seed: two of the six are held out.
        result = distil(model, tmp_path / "out", "eval_problems=2", "eval_seed=2")
        assert result.code == 0, result.err
        assert "out of 4 (" in (tmp_path / "out" / "README.md").read_text()
        assert [line.split(" | ")[0] for line in result.out.splitlines() if line.startswith("| ")] == [
            "| model", "| before", "| after",
        ]  # fmt: skip

    def test_all_weights_can_be_trained(self, model: Path, tmp_path: Path) -> None:
        out = succeed(model, tmp_path / "out", "rank=null")
        before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
        assert all(not torch.equal(before[name], after[name]) for name in before)
        assert dllm.generate(dllm.load(out, device="cpu"), QUESTIONS[0], gen_length=4).texts[0] is not None

    def test_a_model_that_attends_in_blocks_is_trained_in_its_blocks(self, tmp_path: Path) -> None:
        words = build_tokenizer()
        backbone = random_sdar(len(words), dtype=torch.float32).backbone
        model = save_folder(dllm.LanguageModel(backbone, words, "sdar"), tmp_path / "sdar")
        out = succeed(model, tmp_path / "out", "block_length=auto", "steps=40", "rate=0.01", "checkpoint_every=40")
        found = losses(out)
        assert sum(found[-10:]) < 0.8 * sum(found[:10])
        assert dllm.load(model, adapter=out, device="cpu").backbone.pattern.length == 4

    def test_an_adapter_is_no_model_to_train(self, distilled: Path, tmp_path: Path) -> None:
        result = distil(distilled, tmp_path / "out")
        assert result.err == (
            f"dllm distill: error: model={str(distilled)!r} is an adapter, which cannot be trained; give a complete "
            "model\n"
        )

    def test_a_model_without_masks_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers.models.diffusion_gemma")
        model = save_folder(random_diffusion_gemma(), tmp_path / "gemma")
        result = distil(model, tmp_path / "out")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "has no [MASK], which distilling needs" in result.err


class TestResuming:
    def test_a_resumed_run_ends_as_an_uninterrupted_one(
        self, model: Path, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step, out = training.Trainer.train_step, tmp_path / "out"

        def interrupt(trainer: training.Trainer) -> Tensor:
            if trainer.step == 4:
                raise KeyboardInterrupt
            return step(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(training.Trainer, "train_step", interrupt)
            result = distil(model, out)
        assert result.code == 130
        assert result.err.endswith("dllm distill: error: interrupted; what was written is kept\n")
        assert not same(out, distilled)
        with monkeypatch.context() as patch:
            patch.setattr(dllm, "generate", lambda *_, **__: pytest.fail("decoded again"))
            succeed(model, out)
        assert same(out, distilled)
        assert losses(out) == losses(distilled)

    def test_other_problems_to_measure_are_another_training(self, model: Path, tmp_path: Path) -> None:
        succeed(model, tmp_path / "out")
        result = distil(model, tmp_path / "out", "eval_seed=2")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert (
            "says eval_seed=1000001, this run has eval_seed=2, so it holds the training of another model" in result.err
        )

    def test_other_prompts_or_another_model_are_another_training(self, tmp_path: Path) -> None:
        model, out, data = folder_of(random_llada, tmp_path / "model"), tmp_path / "out", tmp_path / "q.jsonl"
        trained = out / "state.pt", out / "trajectories"

        def ask(questions: list[str]) -> None:
            data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))

        def other_model() -> None:
            save_file(
                {name: value * 1.5 for name, value in start.items()}, model / "model.safetensors", {"format": "pt"}
            )

        ask(QUESTIONS)
        succeed(model, out, f"data={data}")
        start, before = load_file(model / "model.safetensors"), (out / "adapter_model.safetensors").read_bytes()
        for change, named in ((lambda: ask(QUESTIONS[::-1]), f"data='{data}'"), (other_model, f"model.path='{model}'")):
            change()
            for _ in range(2):
                result = distil(model, out, f"data={data}")
                assert (result.code, result.err) == (
                    2,
                    f"dllm distill: error: out='{out}' was trained with other contents of {named}; give another out, "
                    f"or remove {trained[0]} and {trained[1]} to train from scratch\n",
                )
                shutil.rmtree(trained[1], ignore_errors=True)
            assert (out / "adapter_model.safetensors").read_bytes() == before
            trained[0].unlink()
            succeed(model, out, f"data={data}")
            assert same(out, succeed(model, tmp_path / f"new-{change.__name__}", f"data={data}"))
            before = (out / "adapter_model.safetensors").read_bytes()

    def test_a_training_of_an_earlier_version_goes_on_and_is_removed_whole(self, model: Path, tmp_path: Path) -> None:
        out, data = tmp_path / "out", tmp_path / "q.jsonl"
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
        succeed(model, out, f"data={data}")
        state = torch.load(out / "state.pt", weights_only=True)
        del state["contents"]
        torch.save(state, out / "state.pt")
        succeed(model, out, f"data={data}")
        data.write_text(json.dumps({"prompt": "Hi"}) + "\n")
        result = distil(model, out, f"data={data}")
        assert result.code == 2
        assert result.err.endswith(
            f"has records of other settings (prompts); give another out, or remove that folder and {out / 'state.pt'}\n"
        )

    def test_a_damaged_batch_is_decoded_again(self, model: Path, distilled: Path, tmp_path: Path) -> None:
        out = succeed(model, tmp_path / "out")
        part = out / "trajectories" / "0000004.safetensors"
        good = part.read_bytes()
        flipped = good[:-8] + bytes([good[-8] ^ 1]) + good[-7:]
        for bad in (b"", flipped, {"completions": torch.zeros((2, 9), dtype=torch.long)}, {"other": torch.zeros(1)}):
            part.write_bytes(bad) if isinstance(bad, bytes) else save_file(bad, part)
            succeed(model, out)
            assert part.read_bytes() == good
        assert same(out, distilled)

    def test_the_batch_of_other_prompts_or_of_another_recipe_is_decoded_again(
        self, model: Path, tmp_path: Path
    ) -> None:
        options = "batch_size=3", "rank=1", "steps=1"
        out, other = (
            succeed(model, tmp_path / name, *options, *more)
            for name, more in (("out", ()), ("other", ("temperature=0.5",)))
        )
        first, second = (out / "trajectories" / f"000000{start}.safetensors" for start in (0, 3))
        good = second.read_bytes()
        for wrong in (first, other / "trajectories" / second.name):
            shutil.copy(wrong, second)
            succeed(model, out, *options)
            assert second.read_bytes() == good

    def test_batches_of_an_earlier_version_are_kept(self, model: Path, tmp_path: Path) -> None:
        out = succeed(model, tmp_path / "out", *(options := ("batch_size=3", "rank=1", "steps=1")))
        parts = sorted((out / "trajectories").glob("*.safetensors"))
        for part in parts:  # with a hash of the tensors alone
            found = load_file(part)
            digest = sha256(b"".join(name.encode() + each.numpy().tobytes() for name, each in sorted(found.items())))
            save_file(found, part, {"digest": digest.hexdigest()})
        before = [part.read_bytes() for part in parts]
        succeed(model, out, *options)
        assert [part.read_bytes() for part in parts] == before

    @pytest.mark.parametrize("when", ["training", "measuring"])
    def test_a_model_that_is_changed_meanwhile_is_told(
        self, model: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = Path(shutil.copytree(model, tmp_path / "model"))
        file = folder / "model.safetensors"
        other = save({name: 2 * tensor for name, tensor in load_file(file).items()}, {"format": "pt"})
        step, measure = training.Trainer.train_step, dllm.scripts.distill._measure

        def written_over(trainer: Any) -> Tensor:
            with file.open("r+b") as target:
                target.write(other)
            return step(trainer)

        def replaced(*arguments: Any) -> Any:
            (tmp_path / "new").write_bytes(other)
            (tmp_path / "new").replace(file)
            return measure(*arguments)

        if when == "training":
            monkeypatch.setattr(training.Trainer, "train_step", written_over)
        else:
            monkeypatch.setattr(dllm.scripts.distill, "_measure", replaced)
        result = distil(folder, tmp_path / "out", "eval_problems=1")
        assert result.code == 2
        assert "was changed by another program during this run" in result.err.splitlines()[-1]

    def test_an_adapter_that_is_changed_while_it_is_measured_is_told(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, measure = tmp_path / "out" / "adapter_model.safetensors", dllm.scripts.distill._measure

        def replaced(*arguments: Any) -> Any:
            write_whole(file, save({name: 0 * tensor for name, tensor in load_file(file).items()}, {"format": "pt"}))
            return measure(*arguments)

        monkeypatch.setattr(dllm.scripts.distill, "_measure", replaced)
        result = distil(model, tmp_path / "out", "eval_problems=1")
        assert result.code == 2
        assert f"{file} was changed by another program during this run" in result.err.splitlines()[-1]
        assert not (tmp_path / "out" / "README.md").exists()

    def test_a_training_that_diverges_ends_and_keeps_what_was_good(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        result = distil(model, out, "rate=1e6", "log_every=6", "checkpoint_every=1", "warmup=6")
        assert result.code == 2
        assert re.search(
            r"NaN or infinite after \d steps with rate=1000000.0; use less, and another out\n$", result.err
        )
        assert all(bool(each.isfinite().all()) for each in weights(out).values())
        state = torch.load(out / "state.pt", weights_only=True)
        assert all(bool(each.isfinite().all()) for each in (*state["model"], *state["average"]))
        state["average"][0][:] = torch.nan
        torch.save(state, out / "state.pt")
        result = distil(model, out, "rate=1e6", "log_every=6", "checkpoint_every=1", "warmup=6")
        assert result.code == 2
        assert "state.pt is damaged (weights that are NaN or infinite)" in result.err

    def test_other_options_are_refused_by_name(self, model: Path, distilled: Path) -> None:
        for change in ("seed=3", "rank=2", "mask_ratio=0.3", "gen_length=8", "sampler=threshold", "entropy_weight=1"):
            result = distil(model, distilled, change)
            assert (result.code, result.err.count("\n")) == (2, 1)
            assert f"{change.partition('=')[0]}=" in result.err
            assert "give another folder" in result.err

    def test_files_of_others_are_refused_before_any_work(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dllm, "load", lambda *_, **__: pytest.fail("a model was loaded"))
        for name in ("README.md", "adapter_model.safetensors", "state.pt", "distill.yaml"):
            folder = tmp_path / name.partition(".")[0] / name
            folder.mkdir(parents=True)
            (folder / name).write_text("Mine.\n")
            result = distil(model, folder)
            assert result.err == (
                f"dllm distill: error: out='{folder}': {folder / name} exists and is of no model of dllm distill; give "
                "another folder\n"
            )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["rank=0"], "rank=0 is out of range"),
        (["alpha=0"], "alpha=0 is out of range"),
        (["rank=null", "alpha=2"], "alpha=2 has no effect with rank=null"),
        (["mask_ratio=0"], "mask_ratio=0 is out of range"),
        (["mask_ratio=1.5"], "mask_ratio=1.5 is out of range"),
        (["entropy_temperature=0"], "entropy_temperature=0 is out of range"),
        (["entropy_weight=-1"], "entropy_weight=-1 is out of range"),
        (["rate=0"], "rate=0 is out of range"),
        (["steps=0"], "steps=0 is out of range"),
        (["train_batch_size=0"], "train_batch_size=0 is out of range"),
        (["ema=1"], "ema=1 is out of range"),
        (["seed=null"], "seed="),
        (["autocast=int8"], "unknown autocast='int8'"),
        (["gen_length=auto"], "gen_length=auto is not supported"),
        (["eval_sampler=nope"], "eval_sampler='nope'"),
        (["eval_problems=-1"], "eval_problems=-1"),
        (["model.adapter=here"], "model.adapter='here' is not supported in training"),
        (["model.device_map=auto"], "model.device_map='auto' is not supported in training"),
        (["prompts=0"], "prompts=0 is out of range"),
        (["split=train"], "split='train' has no effect without a data set"),
        (["data=nowhere.jsonl"], "data='nowhere.jsonl'"),
        (["data=/"], "data='/' with split='train' cannot be read"),
        (["out=/dev/null/x"], "out='/dev/null/x' cannot be written"),
        (["temperatur=1"], "unknown option 'temperatur'"),
        (["model.device=nowhere"], "model.device='nowhere' is not available here"),
        (["model=nowhere"], "model='nowhere' is not a folder"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], named: str) -> None:
    result = command("distill", f"out={tmp_path}/out", *arguments)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result.err
    assert result.err.startswith("dllm distill: error: ")
    assert named in result.err
    assert not (tmp_path / "out").exists()
