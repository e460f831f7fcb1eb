"""`dllm train-tiny`: it learns, survives interruptions, starts warm, and says honestly what came out."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2ForCausalLM

import dllm
from commands import Outcome, command
from dllm.evaluation.claim import Claim
from dllm.scripts import model_card, tiny_models
from dllm.scripts import train_tiny as application
from dllm.scripts.app import rewrite
from dllm.scripts.model_card import measure
from dllm.tasks import word_problems
from dllm.tasks.tokenizer import build_tokenizer

ARCHITECTURES = ["guide", "llada", "dream"]
TINY = [
    "model.hidden_size=16", "model.intermediate_size=32", "model.num_layers=1", "batch_size=4", "compile=false",
    "autocast=null", "log_every=1", "checkpoint_every=3", "eval_problems=0", "steps=6",
]  # fmt: skip
QUESTION = "Tom has 5 pens. He buys 7. He loses 2. How many pens does he have?"


def train(out: Path, *arguments: str) -> Outcome:
    return command("train-tiny", f"out={out}", *TINY, *arguments)


def succeed(out: Path, *arguments: str) -> Path:
    result = train(out, *arguments)
    assert (result.code, result.err) == (0, "")
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six steps of each architecture, the denoisers from nothing."""
    folder = tmp_path_factory.mktemp("trained")
    return {arch: succeed(folder / arch, f"arch={arch}") for arch in ARCHITECTURES}


@pytest.fixture(scope="module")
def guide(trained: dict[str, Path]) -> Path:
    """A guide whose biases are not zero, to see which are taken over."""
    model = Qwen2ForCausalLM.from_pretrained(trained["guide"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    folder = trained["guide"].parent / "biased"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each finished model, measured on a few problems and published."""
    folders = {arch: tmp_path_factory.mktemp("published") / "new" / f"tiny-{arch}" for arch in ARCHITECTURES}
    for arch, folder in folders.items():
        succeed(trained[arch], f"arch={arch}", "eval_problems=3", f"publish={folder}")
    return folders


def composed(*overrides: str) -> Any:
    with initialize_config_module("dllm.conf", version_base="1.3"):
        return compose("train_tiny", rewrite(overrides, "train_tiny"))


def losses(out: Path) -> list[list[str]]:
    """Step and loss of each line of loss.csv."""
    return [line.split(",")[:2] for line in (out / "loss.csv").read_text().splitlines()]


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestTraining:
    @pytest.mark.parametrize("arch", ["llada", "dream"])
    def test_a_trained_denoiser_loads_and_answers(self, trained: dict[str, Path], arch: str) -> None:
        lm = dllm.load(trained[arch], device="cpu")
        out = dllm.generate(lm, QUESTION, gen_length=8)
        assert isinstance(out.texts[0], str)
        assert lm.backbone.config.model_type.lower() == arch
        assert lm.tokenizer.get_vocab() == build_tokenizer().get_vocab()

    def test_a_trained_guide_loads_and_continues(self, trained: dict[str, Path]) -> None:
        model = Qwen2ForCausalLM.from_pretrained(trained["guide"])
        ids = build_tokenizer()([QUESTION], return_tensors="pt").input_ids
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_the_loss_of_every_step_is_recorded(self, trained: dict[str, Path], arch: str) -> None:
        recorded = losses(trained[arch])
        assert [step for step, _ in recorded] == [str(n) for n in range(1, 7)]
        # About log V, that of a uniform guess, for a model that has seen nothing yet.
        assert all(abs(float(loss) - torch.tensor(144.0).log()) < 0.5 for _, loss in recorded)

    def test_it_learns(self, tmp_path: Path) -> None:
        more = ["steps=60", "warmup=1", "batch_size=8", "checkpoint_every=60", "log_every=20"]
        first, _, last = (float(loss) for _, loss in losses(succeed(tmp_path, "arch=guide", *more)))
        assert last < 0.8 * first

    def test_the_seed_decides_everything(self, trained: dict[str, Path], tmp_path: Path) -> None:
        assert same(succeed(tmp_path / "again", "arch=llada"), trained["llada"])
        assert not same(succeed(tmp_path / "other", "arch=llada", "seed=2"), trained["llada"])

    def test_what_is_saved_is_the_average(self, trained: dict[str, Path]) -> None:
        state = torch.load(trained["llada"] / "state.pt", weights_only=True)
        saved = list(dllm.load(trained["llada"], device="cpu").backbone.parameters())
        assert all(torch.equal(a, b) for a, b in zip(saved, state["average"], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(saved, state["model"], strict=True))


class TestResuming:
    @pytest.fixture
    def interrupted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
        """A run that Ctrl+C ends in its fifth step, two after the last checkpoint."""
        step = application.Trainer.train_step

        def interrupt(trainer: application.Trainer) -> Tensor:
            if trainer.step == 4:
                raise KeyboardInterrupt
            return step(trainer)

        monkeypatch.setattr(application.Trainer, "train_step", interrupt)
        arch, *options = request.param.split()
        result = train(tmp_path / "run", f"arch={arch}", *options)
        monkeypatch.setattr(application.Trainer, "train_step", step)
        assert (result.code, result.err) == (130, "dllm train-tiny: error: interrupted; what was written is kept\n")
        return tmp_path / "run"

    @pytest.mark.parametrize(("interrupted", "arch"), [(a, a) for a in ARCHITECTURES], indirect=["interrupted"])
    def test_a_resumed_run_ends_as_an_uninterrupted_one(
        self, interrupted: Path, arch: str, trained: dict[str, Path]
    ) -> None:
        assert losses(interrupted) == losses(trained[arch])[:4]
        assert not same(interrupted, trained[arch])
        succeed(interrupted, f"arch={arch}")
        assert same(interrupted, trained[arch])
        assert losses(interrupted) == losses(trained[arch])

    @pytest.mark.parametrize("interrupted", ["dream"], indirect=True)
    def test_an_interrupted_folder_loads_already(self, interrupted: Path) -> None:
        assert dllm.generate(dllm.load(interrupted, device="cpu"), QUESTION, gen_length=4).nfe.item() > 0

    @pytest.mark.parametrize("interrupted", ["llada"], indirect=True)
    def test_a_line_of_the_log_that_was_cut_off_is_dropped(self, interrupted: Path, trained: dict[str, Path]) -> None:
        with (interrupted / "loss.csv").open("a") as file:
            file.write("1")  # of 100, say
        succeed(interrupted, "arch=llada")
        assert losses(interrupted) == losses(trained["llada"])

    @pytest.mark.parametrize("interrupted", ["guide log_every=2"], indirect=True)
    def test_a_line_of_the_log_is_the_mean_of_all_its_steps(self, interrupted: Path, trained: dict[str, Path]) -> None:
        succeed(interrupted, "arch=guide", "log_every=2")  # the first step of the second line is not trained again
        every = [float(loss) for _, loss in losses(trained["guide"])]
        means = [(one + other) / 2 for one, other in zip(every[::2], every[1::2], strict=True)]
        assert [float(loss) for _, loss in losses(interrupted)] == pytest.approx(means, abs=2e-5)

    @pytest.mark.parametrize("interrupted", ["guide"], indirect=True)
    def test_a_checkpoint_of_an_earlier_version_goes_on(self, interrupted: Path, trained: dict[str, Path]) -> None:
        state = torch.load(interrupted / "state.pt", weights_only=True)
        del state["losses"], state["recipe"]
        torch.save(state, interrupted / "state.pt")
        succeed(interrupted, "arch=guide", "matrix_lr=2.0e-2")
        assert same(interrupted, trained["guide"])

    @pytest.mark.parametrize("kind", [SafetensorError, Exception])  # of safetensors and of tokenizers
    def test_a_full_disk_is_one_line_and_the_training_goes_on(
        self, trained: dict[str, Path], tmp_path: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "full"

        def full(*_: object) -> None:
            raise kind("I/O error: No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr(application.OnWordProblems, "save", full)
            result = train(out, "arch=guide")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "No space left on device (os error 28)); free disk space" in result.err
        assert not list(out.glob(".dllm-*"))
        assert same(succeed(out, "arch=guide"), trained["guide"])

    def test_hidden_folders_are_kept_but_those_of_a_process_that_was_killed(
        self, trained: dict[str, Path], tmp_path: Path
    ) -> None:
        out = Path(shutil.copytree(trained["guide"], tmp_path / "copy"))
        others = [".export", ".dllm-notes", ".dllm-0123456789abcdef"]
        for name in others:
            (out / name).mkdir()
            (out / name / "notes.txt").write_text("mine")
        succeed(out, "arch=guide")
        assert [(out / name).exists() for name in others] == [True, True, False]

    def test_a_finished_run_only_writes_its_model_again(self, trained: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "copy"
        shutil.copytree(trained["dream"], out)
        (out / "model.safetensors").unlink()  # as if killed while writing it
        succeed(out, "arch=dream")
        assert same(out, trained["dream"])
        assert losses(out) == losses(trained["dream"])
        assert "matrix_lr: 0.02\n" in (out / "README.md").read_text()

    def test_the_training_of_another_model_is_not_resumed(self, trained: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "copy"
        shutil.copytree(trained["llada"], out)
        before = (out / "state.pt").read_bytes()
        for change in ("arch=dream", "model.hidden_size=32"):
            result = train(out, "arch=llada", change)
            assert result.code == 2
            assert "holds the training of another model; give another folder" in result.err
        assert (out / "state.pt").read_bytes() == before


class TestWarmStart:
    def build(self, arch: str, init: Path) -> Any:
        cfg = OmegaConf.create((Path(application.__file__).parent.parent / "conf" / "train_tiny.yaml").read_text())
        cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist([a for a in TINY if a.startswith("model.")]))
        cfg.arch, cfg.init = arch, str(init)
        return tiny_models.build_model(cfg, build_tokenizer()).eval()

    @torch.no_grad()
    def test_dream_takes_over_every_tensor(self, guide: Path) -> None:
        source, model = load_file(guide / "model.safetensors"), self.build("dream", guide).state_dict()
        assert model.keys() == source.keys()
        assert all(torch.equal(model[name], source[name]) for name in source)

    @torch.no_grad()
    def test_llada_computes_what_dream_does_without_biases(self, trained: dict[str, Path], guide: Path) -> None:
        ids = torch.tensor(build_tokenizer()([QUESTION]).input_ids)
        dream, llada = self.build("dream", guide), self.build("llada", guide)
        for norm in (module for module in llada.modules() if hasattr(module, "eps")):
            norm.eps = dream.config.rms_norm_eps  # the families differ in it
        for name, parameter in dream.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        torch.testing.assert_close(llada(ids).logits, dream(ids).logits, atol=1e-4, rtol=1e-4)
        assert llada.config.n_kv_heads == llada.config.n_heads == 4
        fresh = dllm.load(trained["llada"], device="cpu").backbone
        assert not torch.allclose(fresh(ids).logits, llada(ids).logits, atol=1e-2)

    def test_training_starts_from_it(self, guide: Path, trained: dict[str, Path], tmp_path: Path) -> None:
        out = succeed(tmp_path / "warm", "arch=llada", f"init={guide}", "steps=1")
        warm, cold, start = losses(out)[0][1], losses(trained["llada"])[0][1], load_file(guide / "model.safetensors")
        assert warm != cold
        moved = (weights(out)["model.transformer.wte.weight"] - start["model.embed_tokens.weight"]).abs().max()
        assert moved < 1e-3  # one step of the warm-up
        assert "starting from the weights of biased" in (out / "README.md").read_text()

    def test_other_weights_in_the_same_folder_are_refused(self, guide: Path, tmp_path: Path) -> None:
        init = shutil.copytree(guide, tmp_path / "init")
        out = succeed(tmp_path / "warm", "arch=llada", f"init={init}", "steps=1")
        succeed(out, "arch=llada", f"init={init}", "steps=1")
        changed = {name: tensor * 2 for name, tensor in weights(init).items()}
        save_file(changed, init / "model.safetensors", {"format": "pt"})
        result = train(out, "arch=llada", f"init={init}", "steps=1")
        assert (result.code, result.out) == (2, "")
        assert result.err == (
            f"dllm train-tiny: error: out='{out}' was trained with other contents of init='{init}'; give another out, "
            f"or remove {out / 'state.pt'} to train from scratch\n"
        )


class TestCard:
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_it_states_what_and_how(self, published: dict[str, Path], trained: dict[str, Path], arch: str) -> None:
        card = (published[arch] / "README.md").read_text()
        assert card == (trained[arch] / "README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["license"] == "apache-2.0"
        assert {"library_name", "tags"} <= set(front)
        parameters = sum(tensor.numel() for tensor in weights(published[arch]).values())
        assert f"# tiny-{arch}\n" in card
        assert f"{parameters:,} parameters" in card
        assert "6 steps of 4 problems, seed 1, 0 minutes on cpu (" in card
        recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[0])
        assert (recipe["arch"], recipe["seed"], recipe["steps"], recipe["matrix_lr"]) == (arch, 1, 6, 0.02)
        assert recipe["model"]["hidden_size"] == 16
        assert "On 3 problems of seed 1000001" in card
        assert "word_problems" in card
        assert "## Limits" in card
        assert "/" not in "".join(str(value) for value in recipe.values())

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_its_command_trains_by_its_recipe(self, published: dict[str, Path], arch: str) -> None:
        card = (published[arch] / "README.md").read_text()
        command = re.findall(r"`(dllm train-tiny .*?)`", card)[0]
        again = OmegaConf.to_container(composed(*shlex.split(command)[2:]), resolve=True)
        recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[0])
        assert {name: again[name] for name in recipe} == recipe

    def test_its_command_tells_changed_shares_and_warm_starts(self) -> None:
        shares = "canvas_lengths={52: 0.25, 64: 0.75, 96: 0, 128: 0}"
        change = [shares, "init=somewhere/tiny-guide", "step_weights=[0, 1, 0]", "seed=7"]
        recipe = composed(*change)
        command = model_card._command(recipe)
        again = composed(*shlex.split(command)[2:])
        assert "init=outputs/tiny-guide" in command
        for name in ("canvas_lengths", "step_weights", "seed", "steps"):
            assert again[name] == recipe[name]

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_its_numbers_are_the_measured_ones(self, published: dict[str, Path], arch: str) -> None:
        rows = [line for line in (published[arch] / "README.md").read_text().splitlines() if "% to " in line]
        scores = measure(published[arch], arch, word_problems.problems(3, 1_000_001), "cpu")
        assert list(scores) == (
            ["greedy"] if arch == "guide" else ["vanilla, 1 token per step", "vanilla, 4 tokens per step"]
        )
        assert rows == [
            f"| {label} | {s.final:.1%} | {s.interval[0]:.1%} to {s.interval[1]:.1%} | {s.chain:.1%} |"
            for label, s in scores.items()
        ]

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_only_the_model_is_published(self, published: dict[str, Path], trained: dict[str, Path], arch: str) -> None:
        names = {path.name for path in published[arch].iterdir()}
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
        assert names.isdisjoint({"state.pt", "state.tmp", "loss.csv", "train_tiny.yaml"})
        assert ("generation_config.json" in names) == (arch == "guide")
        assert names == {path.name for path in trained[arch].iterdir()} - {"state.pt", "loss.csv", "train_tiny.yaml"}
        config = json.loads((published[arch] / "config.json").read_text())
        assert not any("/" in str(value) for value in config.values())

    @pytest.mark.parametrize("arch", ["llada", "dream"])
    def test_a_published_model_gives_the_same_answers(
        self, published: dict[str, Path], trained: dict[str, Path], arch: str
    ) -> None:
        lms = [dllm.load(folder[arch], device="cpu") for folder in (published, trained)]
        first, second = (dllm.generate(lm, QUESTION, gen_length=16).completions for lm in lms)
        assert torch.equal(first, second)

    def test_measuring_can_be_left_out(self, trained: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "copy"
        shutil.copytree(trained["llada"], out)
        succeed(out, "arch=llada", "eval_problems=0")
        card = (out / "README.md").read_text()
        assert "Not measured." in card
        assert "%" not in card


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["arch=foo"], "unknown arch='foo'; expected one of guide, llada, dream"),
        (["arch=5"], "arch=5"),
        (["init=/nope"], "init='/nope' cannot be used"),
        (["steps=0"], "steps=0 is out of range"),
        (["steps=ten"], "steps='ten'"),
        (["batch_size=0"], "batch_size=0"),
        (["warmup=0"], "warmup=0"),
        (["checkpoint_every=0"], "checkpoint_every=0"),
        (["log_every=0"], "log_every=0"),
        (["eval_problems=-1"], "eval_problems=-1"),
        (["device=nonsense"], "device='nonsense' is not available here"),
        (["device=meta"], "device='meta' is not available here"),
        (["device=hpu"], "device='hpu' is not available here"),
        (["autocast=int8"], "unknown autocast='int8'"),
        (["compile=perhaps"], "compile='perhaps'"),
        (["threads=x"], "threads='x'"),
        (["model.num_heads=3"], "model.num_heads=3"),
        (["model.num_layers=0"], "model.num_layers=0"),
        (["model.hidden_size=x"], "model.hidden_size='x'"),
        (["step_weights=[a]"], "step_weights=['a']"),
        (["noise=3"], "noise=3"),
        (["prompt_length=9"], "prompt_length=9 is out of range"),
        (["stepz=3"], "unknown option 'stepz' (did you mean steps?); expected one of "),
        (["out=/dev/null/x"], "out='/dev/null/x' cannot be written"),
        (["publish=/dev/null/x"], "publish='/dev/null/x' cannot be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], named: str) -> None:
    result = train(tmp_path / "run", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("dllm train-tiny: error: ")
    assert result.err.count("\n") == 1
    assert named in result.err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_warm_start_from_another_kind_or_size_is_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    for init, more, named in (
        (trained["llada"], "seed=1", "it has a model of type llada"),
        (trained["guide"], "model.num_layers=2", "has other sizes than model.*"),
    ):
        result = train(tmp_path / "run", f"init={init}", more)
        assert result.code == 2
        assert named in result.err


class TestOtherRuns:
    @pytest.fixture
    def out(self, trained: dict[str, Path], tmp_path: Path) -> Path:
        return Path(shutil.copytree(trained["llada"], tmp_path / "copy"))

    def refused(self, out: Path, *arguments: str) -> str:
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        result = train(out, "arch=llada", *arguments)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result.err
        assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        return result.err

    @pytest.mark.parametrize("change", ["seed=2", "steps=9", "matrix_lr=0.5", "noise.full=0", "init=nowhere"])
    def test_of_other_options_are_refused_by_name(self, out: Path, change: str, monkeypatch: Any) -> None:
        monkeypatch.setattr(tiny_models, "_guide_weights", lambda _: load_file(out / "model.safetensors"))
        monkeypatch.setattr(tiny_models, "_as_llada", lambda weights, _: weights)
        said = self.refused(out, change)
        assert change.partition("=")[0].partition(".")[0] + "=" in said
        assert "holds the training of another model; give another folder" in said

    def test_whose_state_lies_beside_another_recipe_are_refused(self, out: Path) -> None:
        recipe = out / "train_tiny.yaml"
        recipe.write_text(recipe.read_text().replace("seed: ", "seed: 1"))
        seed = recipe.read_text().partition("seed: ")[2].split()[0]
        assert "state.pt is of another training than train_tiny.yaml beside it" in self.refused(out, f"seed={seed}")

    def test_without_a_recipe_are_refused(self, out: Path) -> None:
        (out / "train_tiny.yaml").unlink()
        (out / "README.md").write_text("It does one thing: solve the word problems")
        assert "train_tiny.yaml is missing" in self.refused(out)

    @pytest.mark.parametrize(
        "content", [b"arch: foo\nmatrix_lr: 0.02\n", b"- matrix_lr: 1\n", b"\xff\x00 matrix_lr:", b"matrix_lr: [", b""]
    )
    def test_a_damaged_recipe_is_named(self, out: Path, content: bytes) -> None:
        (out / "train_tiny.yaml").write_bytes(content)
        said = self.refused(out)
        assert "train_tiny.yaml" in said

    @pytest.mark.parametrize(
        "name", ["optimizers", "step", "average", "rng", "problems", "seconds", "state", "model", "contents", "losses"]
    )
    def test_a_damaged_state_is_named(self, out: Path, name: str) -> None:
        state = torch.load(out / "state.pt", weights_only=True)
        if name == "state":
            state["optimizers"][1]["state"].popitem()
        else:
            state[name] = state[name][:1] if isinstance(state[name], list) and state[name] else "x"
        torch.save(state, out / "state.pt")
        assert "state.pt is damaged" in self.refused(out)

    def test_a_state_that_does_not_fit_into_memory_is_not_called_damaged(
        self, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: Any, **__: Any) -> Any:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(torch, "load", load)
        assert "out of memory" in self.refused(out)

    def test_a_damaged_log_is_named(self, out: Path) -> None:
        (out / "loss.csv").write_bytes(b"\xff\xfe")
        assert "loss.csv is damaged" in self.refused(out)

    def test_at_the_same_time_are_refused(self, out: Path) -> None:
        claim = Claim(out / "state.pt", "it", "another")
        claim.take()
        try:
            assert "is being written by process" in self.refused(out)
        finally:
            claim.release()

    def test_a_card_changed_by_hand_is_kept(self, out: Path, tmp_path: Path) -> None:
        readme = out / "README.md"
        text = readme.read_text()
        for changed in (f"{text}\nMy notes.\n", text.replace("one thing", "one thing well")):
            readme.write_text(changed)
            result = train(out, "arch=llada", "eval_problems=1", f"publish={tmp_path / 'published'}")
            assert result.code == 0
            assert f"{readme} was changed by hand and is kept; the new model card is {out}/README.new.md" in result.out
            assert readme.read_text() == changed
            new = (out / "README.new.md").read_text()
            assert "On 1 problems" in new
            assert (tmp_path / "published" / "README.md").read_text() == new
        (out / "README.new.md").write_text("mine")
        assert f"the new model card is {out}/README.new1.md" in train(out, "arch=llada", "eval_problems=1").out
        assert (out / "README.new.md").read_text() == "mine"


def test_a_training_that_diverges_ends_in_one_line(tmp_path: Path) -> None:
    result = train(tmp_path / "bad", "arch=guide", "matrix_lr=1e6", "rest_lr=1e6", "warmup=1")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert re.search(r"steps with matrix_lr=1000000.0 and rest_lr=1000000.0; use less, and another out$", result.err)
    assert not (tmp_path / "bad" / "model.safetensors").exists()
