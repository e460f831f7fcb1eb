"""Old results are never given for other weights, configs, tokenizers, guides, filters, tasks or data."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import dllm
from commands import command
from dllm import identity, resolve
from dllm.evaluation.answer_manifest import differences
from dllm.evaluation.journal import Journal
from dllm.evaluation.run_folder import RunFolder
from dllm.evaluation.trace import Trace
from dllm.files import BUNDLED, read_json
from dllm.filters import load_filter
from dllm.samplers import ARGuided, FreeDave, Learn2PD, Oracle
from dllm.scripts import evaluate
from dllm.tasks.arithmetic import WordProblems
from models import random_dream, random_llada, save_folder

SHORT = ("gen_length=8", "block_length=8")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    return save_folder(random_llada(tokenizer=True, max_length=96, dtype=torch.float32), folder)


def one_value(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][1, 3] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def template_apart(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("{{ messages[0].content }}")


CHANGES: dict[str, Callable[[Path], None]] = {
    "one value of one tensor": one_value,
    "a constant of the config": edit("config.json", '"rope_theta": 10000.0', '"rope_theta": 10001.0'),
    "the chat template": lambda folder: (folder / "chat_template.jinja").open("a").write(" ") and None,
    "a chat template in a folder of its own": template_apart,
    "the tokenizer": edit("tokenizer.json", '"Tom"', '"Tim"'),
    "what ends a text": lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 3}') and None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_a_checkpoint_changes_who_it_is(
    change: Callable[[Path], None], saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    assert identity.checkpoint(folder) == identity.checkpoint(saved)
    change(folder)
    assert identity.checkpoint(folder) != identity.checkpoint(saved)


def test_what_does_not_belong_to_a_checkpoint_changes_nothing(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    for name in ("README.md", "trainer_state.json", "mine.safetensors", "mine.json"):
        (folder / name).write_text("{}")
    assert identity.checkpoint(folder) == identity.checkpoint(saved)


def test_links_into_a_store_of_blobs_are_followed(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in shutil.copytree(saved, tmp_path / "blobs").iterdir():
        (folder / file.name).symlink_to(file)
    assert identity.checkpoint(folder) == identity.checkpoint(saved)
    one_value(tmp_path / "blobs")
    assert identity.checkpoint(folder) != identity.checkpoint(saved)


def test_shards_that_only_an_index_names_count(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    found = set()
    for content in (b"1", b"2"):
        (tmp_path / "part.safetensors").write_bytes(content)
        found.add(identity.checkpoint(tmp_path)["weights"])
    assert len(found) == 2


def test_evaluate_runs_again_for_another_checkpoint(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    asked = (
        f"model={folder}", f"out={tmp_path / 'out'}", "task.limit=1", "gen_length=8", "baselines=0", "frames=0",
    )  # fmt: skip
    for count, change in enumerate((lambda folder: None, *CHANGES.values()), start=1):
        change(folder)
        outcome = command("evaluate", *asked)
        assert outcome.code == 0, outcome.err
        assert len(list((tmp_path / "out").glob("*/results.json"))) == count
    found = command("evaluate", *asked)  # and gives what it has where nothing changed
    assert len(list((tmp_path / "out").glob("*/results.json"))) == count, found.out


def own_base(folder: Path, text: str) -> None:
    (folder / "sampler").mkdir(parents=True, exist_ok=True)
    (folder / "sampler" / "mine.yaml").write_text(text)
    resolve.search_also()  # as in a new process


class TestPoliciesOfOnesOwn:
    """A name of one's own says nothing about what a policy is: its YAML may change."""

    FAST, SLOW = "_target_: dllm.samplers.Threshold\nthreshold: 0.1\n", "_target_: dllm.samplers.Vanilla\n"

    def test_a_base_that_changed_is_run_again(self, tmp_path: Path) -> None:
        asked = (
            "evaluate",
            "sampler=edit",
            "sampler.base=mine",
            f"--config-dir={tmp_path}/conf",
            f"out={tmp_path / 'out'}",
        )
        for count, text in enumerate((self.FAST, self.SLOW, self.FAST), start=1):
            own_base(tmp_path / "conf", text)
            outcome = command(*asked, "task.limit=1", "baselines=0", "frames=0", *SHORT)
            assert outcome.code == 0, outcome.err
            found = [read_json(path) for path in (tmp_path / "out").glob("*/results.json")]
            assert len(found) == min(count, 2)
        bases = [each["sampler"]["base"] for each in found]
        assert sorted(base["_target_"] for base in bases) == ["dllm.samplers.Threshold", "dllm.samplers.Vanilla"]
        assert len({each["metrics"]["nfe"] for each in found}) == 2

    def test_answers_of_another_base_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "Tom"}\n')
        asked = (
            "generate", "sampler=sub_blocks", "sampler.base=mine", f"--config-dir={tmp_path}/conf", "show=none", *SHORT,
            f"input={tmp_path / 'in.jsonl'}",
        )  # fmt: skip
        for output in ("out.jsonl", "out/"):
            own_base(tmp_path / "conf", self.FAST)
            assert command(*asked, f"output={tmp_path}/{output}").code == 0
            own_base(tmp_path / "conf", self.FAST.replace("0.1", "0.2"))
            outcome = command(*asked, f"output={tmp_path}/{output}")
            assert outcome.code == 2
            assert "was made with sampler.base.threshold=0.1; this run has sampler.base.threshold=0.2" in outcome.err

    def test_one_that_is_its_own_base_is_refused(self, tmp_path: Path) -> None:
        own_base(tmp_path, "_target_: dllm.samplers.SubBlocks\nbase: mine\n")
        outcome = command("generate", "sampler=mine", f"--config-dir={tmp_path}", "prompt=Tom", *SHORT)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "sampler=mine is its own base" in outcome.err

    def test_another_class_under_the_same_name_is_run_again(self, tmp_path: Path) -> None:
        asked = ("evaluate", "cache=prefix", f"out={tmp_path}", "task.limit=1", "baselines=0", "frames=0", *SHORT)
        for more in ((), ("cache._target_=dllm.cache.Dual",)):
            assert command(*asked, *more).code == 0
        found = [read_json(path)["cache"] for path in tmp_path.glob("*/results.json")]
        assert sorted(each.get("_target_", "") for each in found) == ["", "dllm.cache.Dual"]


class TestFilesOfSamplers:
    def test_guides_and_filters_are_known_by_their_content(self, saved: Path, tmp_path: Path) -> None:
        guide = shutil.copytree(BUNDLED / "tiny-guide", tmp_path / "guide")
        for name in ("learn2pd.safetensors", "learn2pd.json"):
            shutil.copy(BUNDLED / "tiny-llada" / name, tmp_path)
        guided, learned = ARGuided(str(guide)), Learn2PD(str(tmp_path / "learn2pd.safetensors"))
        for sampler, change in (
            (guided, edit("guide/config.json", '"rope_theta": 10000.0', '"rope_theta": 10001.0')),
            (guided, lambda folder: one_value(folder / "guide")),
            (guided, edit("guide/tokenizer.json", '"Tom"', '"Tim"')),
            (learned, edit("learn2pd.json", '"tiny-llada"', '"other"')),
            (FreeDave(base=learned), lambda folder: (folder / "learn2pd.safetensors").open("ab").write(b" ") and None),
        ):
            before = identity.read_by(sampler)
            assert before == identity.read_by(sampler)
            change(tmp_path)
            assert identity.read_by(sampler).keys() == before.keys()
            assert identity.read_by(sampler) != before

    def test_the_code_of_ones_own_classes_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "own_policy.py"
        file.write_text("from dllm.samplers import Vanilla\n\n\nclass Own(Vanilla):\n    pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        own = importlib.import_module("own_policy").Own()
        for value in (own, FreeDave(base=own)):
            before = identity.read_by(value)
            assert list(before) == ["module own_policy"]
            file.write_text(file.read_text() + "# changed\n")
            assert identity.read_by(value) != before
        assert identity.read_by(FreeDave()) == {}

    def test_so_does_what_it_imports(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sources = {
            "own_a/__init__.py": "",
            "own_a/policy.py": "import json, torch\nfrom . import level\nfrom dllm.samplers import Vanilla\n"
            "import own_b\n\nclass Own(Vanilla):\n    pass\n",
            "own_a/level.py": "def level():\n    from .late import late\n    return late\n",
            "own_a/late.py": "from . import policy, missing\nfrom ...beyond import x\n"  # a circle
            "from loose.part import x\nimport installed",
            "loose/part/x.py": "",  # no package has an __init__.py
            "lib/installed/__init__.py": "",
            "lib/installed-1.dist-info/METADATA": "",
            "own_a/unused.py": "",
            "own_b.py": "",
        }
        for name, source in sources.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(source)
        monkeypatch.syspath_prepend(tmp_path / "lib")
        monkeypatch.syspath_prepend(tmp_path)
        own = importlib.import_module("own_a.policy").Own()
        (tmp_path / "own_b.py").write_text("this is not Python")
        before = identity.read_by(own)
        modules = {"own_a.policy", "own_a", "own_a.level", "own_a.late", "own_b", "loose.part.x"}
        assert before.keys() == {f"module {name}" for name in modules}
        (tmp_path / "own_a" / "late.py").write_text("late = 2\n")
        assert identity.read_by(own) != before
        assert set(sys.modules) >= {"own_a.level", "own_b"}
        assert "own_a.late" not in sys.modules

    def test_bundled_ones_are_as_well(self) -> None:
        assert str(BUNDLED / "tiny-guide") in identity.read_by(ARGuided())
        names = {str(BUNDLED / name / f"learn2pd.{end}") for name in ("tiny-llada", "tiny-dream")
                 for end in ("json", "safetensors")}  # fmt: skip
        for sampler in (Learn2PD(), FreeDave(base="learn2pd"), Oracle(base="learn2pd"), Oracle(base=Learn2PD())):
            assert identity.read_by(sampler).keys() == names
        assert identity.read_by(FreeDave()) == {}


def test_folders_that_links_lead_to_are_part_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "there").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "back").symlink_to(tmp_path / "a")  # a circle
    (tmp_path / "b" / "rows").write_text("1")
    before = identity.tree(tmp_path / "a")
    (tmp_path / "b" / "rows").write_text("2")
    assert identity.tree(tmp_path / "a") != before


class TestHashesOfBigFiles:
    def test_are_kept_until_the_file_changes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hashed: list[str] = []
        real = identity._hash
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(identity, "_BIG", 4)
        monkeypatch.setattr(identity, "_hash", lambda path: hashed.append(path.name) or real(path))
        file, small = tmp_path / "a", tmp_path / "b"
        file.write_bytes(b"12345")
        small.write_bytes(b"1")
        for _ in range(2):
            assert identity.digest(file) == real(file)
            identity.digest(small)
        assert hashed == ["a", "b", "b"]
        file.write_bytes(b"67890")
        assert identity.digest(file) == real(file)
        before = file.stat()
        file.write_bytes(b"abcde")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as copying it with its time would
        assert identity.digest(file) == real(file)
        (note,) = (tmp_path / "cache" / "dllm" / "digests").iterdir()
        for content in ("", "[]", "{", '{"sha256": 5}'):
            note.write_text(content)
            assert identity.digest(file) == real(file)

    def test_without_a_place_for_them_are_made_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("x")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        monkeypatch.setattr(identity, "_BIG", 0)
        assert identity.digest(tmp_path / "file") == identity.digest(tmp_path / "file")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        assert identity.digest(tmp_path / "file") == identity._hash(tmp_path / "file")


class TestFingerprint:
    @pytest.mark.parametrize("make", [random_llada, random_dream])
    def test_any_single_value_tells(self, make: Any) -> None:
        backbone = make().backbone
        before = backbone.fingerprint()
        for parameter in backbone.parameters():
            flat = parameter.data.view(-1)
            for place in (1, len(flat) // 3, -1):
                flat[place] *= -1.5
                assert backbone.fingerprint() != before
                flat[place] /= -1.5
        assert backbone.fingerprint() == before

    def test_changes_of_signs_do_not_cancel_out(self) -> None:
        backbone = random_llada().backbone
        before, weight = backbone.fingerprint(), next(backbone.parameters()).data
        weight *= -1
        assert backbone.fingerprint() != before

    def test_the_constants_of_the_config_tell(self) -> None:
        backbone = random_dream().backbone
        before = backbone.fingerprint()
        backbone.config.rope_theta = 5e5
        assert backbone.fingerprint() != before

    def test_it_is_the_same_in_any_precision_and_layout(self) -> None:
        found = {random_llada(dtype=kind).backbone.fingerprint() for kind in (torch.float32, torch.float64)}
        found.add(random_llada(dtype=torch.float32).backbone.to(torch.bfloat16).fingerprint())
        assert len(found) == 1

    def test_a_filter_does_not_fit_weights_that_differ_in_one_value(self) -> None:
        lm = dllm.load("tiny-llada", device="cpu", dtype="float32")
        dllm.generate(lm, "Tom has 3 pens.", Learn2PD(), gen_length=32)
        next(lm.backbone.parameters()).data.view(-1)[1] += 1
        with pytest.raises(ValueError, match="filter=null: there is no bundled filter"):
            dllm.generate(lm, "Tom has 3 pens.", Learn2PD(), gen_length=32)

    def test_what_is_made_in_memory_is_known_by_all_it_holds(self) -> None:
        first, same, other = (random_llada(seed=seed, tokenizer=True) for seed in (0, 0, 1))
        assert identity.model(first) == identity.model(same)
        assert identity.model(first)["weights"] != identity.model(other)["weights"]
        weight = next(same.backbone.parameters()).data
        weight.view(-1)[5] *= 1 + 1e-9  # less than bfloat16 can tell
        assert identity.model(first)["weights"] != identity.model(same)["weights"]
        assert same.tokenizer is not None
        same.tokenizer.chat_template = "{{ messages }}"
        assert identity.model(first)["tokenizer_and_config"] != identity.model(same)["tokenizer_and_config"]


class TestTasks:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "base.yaml").write_text("output_type: generate_until\ndoc_to_text: '{{q}}'\n")
        (tmp_path / "rows.jsonl").write_text('{"q": "1"}\n')
        (folder / "utils.py").write_text("def grade(doc, results):\n    return {'a': 1}\n")
        (folder / "mine.yaml").write_text(
            f"include: {tmp_path / 'elsewhere' / 'base.yaml'}\ntask: mine\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
            "process_results: !function utils.grade\n"
        )
        (folder / "group.yaml").write_text("group: several\ntask:\n- mine\n")
        (folder / "inline.yaml").write_text(
            "group: inline\ntask:\n- {task: inner, dataset_path: json, "
            f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}}}\n"
        )
        return folder

    @pytest.mark.parametrize("name", ["mine", "several"])
    @pytest.mark.parametrize(
        "file", ["tasks/mine.yaml", "tasks/utils.py", "elsewhere/base.yaml", "rows.jsonl"], ids=lambda file: file
    )
    def test_everything_a_task_is_made_of_tells(self, name: str, file: str, folder: Path) -> None:
        tasks = pytest.importorskip("lm_eval.tasks")
        from dllm.tasks.definition import definition

        manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
        before = [definition(manager, name, path) for path in (str(folder), None)]
        with (folder.parent / file).open("a") as text:
            text.write("\n# changed\n" if "jsonl" not in file else '{"q": "2"}\n')
        after = [definition(manager, name, path) for path in (str(folder), None)]
        assert not set(before) & set(after)

    def test_data_of_a_task_within_its_groups_file_tells(self, folder: Path) -> None:
        tasks = pytest.importorskip("lm_eval.tasks")
        from dllm.tasks.definition import definition

        manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
        before = definition(manager, "inline", str(folder))
        (folder.parent / "rows.jsonl").write_text('{"q": "2"}\n')
        assert definition(manager, "inline", str(folder)) != before

    def test_another_harness_is_another_task(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tasks = pytest.importorskip("lm_eval.tasks")
        from dllm.tasks import definition as module

        manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
        before = module.definition(manager, "mine", None)
        monkeypatch.setattr(module, "version", lambda name: "99")
        assert module.definition(manager, "mine", None) != before


def doubled(file: Path) -> bytes:
    return save({name: 2 * tensor for name, tensor in load_file(file).items()}, {"format": "pt"})


@pytest.mark.parametrize("kind", ["evaluate", "generate"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_are_replaced_while_a_model_is_loaded_give_its_results_to_nobody(
    name: str, kind: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, load = shutil.copytree(saved, tmp_path / "model"), dllm.load
    replacing = [True]

    def loaded(*arguments: Any, **options: Any) -> Any:
        lm = load(*arguments, **options)
        if replacing:
            (tmp_path / "new").write_bytes((folder / name).read_bytes())
            (tmp_path / "new").replace(folder / name)
        return lm

    monkeypatch.setattr(dllm, "load", loaded)
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text('{"prompt": "Tom has 2 apples."}\n')
    given = {
        "evaluate": (f"out={tmp_path / 'out'}", "task.limit=1", "baselines=0"),
        "generate": (f"input={questions}", f"output={answers}"),
    }[kind]
    words = (kind, "model=custom", f"model.path={folder}", *given, *SHORT)
    outcome = command(*words)
    assert outcome.code == 2
    assert f"{folder / name} was changed by another program during this run; run the command again" in outcome.err
    assert not answers.exists()
    assert not list(tmp_path.glob("out/*/results.json"))
    replacing.clear()
    assert command(*words).code == 0


def test_weights_that_are_written_over_during_a_run_give_no_more_answers(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, add = shutil.copytree(saved, tmp_path / "model"), Journal.add
    weights = folder / "model.safetensors"
    before, other = weights.read_bytes(), doubled(weights)
    words = ("evaluate", "model=custom", f"model.path={folder}", f"out={tmp_path / 'out'}", "task.limit=3", *SHORT)

    def written_over(journal: Journal, kind: str, name: str, value: Any) -> None:
        add(journal, kind, name, value)
        if kind == "record":
            with weights.open("r+b") as file:
                file.write(other)

    with monkeypatch.context() as changing:
        changing.setattr(Journal, "add", written_over)
        outcome = command(*words, "batch_size=1", "baselines=0")
    assert outcome.code == 2
    assert f"{weights} was changed by another program during this run" in outcome.err
    (journal,) = tmp_path.glob("out/*/journal.jsonl")
    assert journal.read_text().count('"kind": "record"') == 1
    weights.write_bytes(before)
    assert command(*words, "batch_size=1", "baselines=0").code == 0
    assert not journal.exists()


def test_steps_that_are_removed_during_a_run_are_told_and_recorded_again(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = RunFolder.finish
    words = ("evaluate", "model=custom", f"model.path={saved}", f"out={tmp_path}", "task.limit=2", "frames=2", *SHORT)

    def without(folder: RunFolder, *arguments: Any) -> Any:
        (folder.path / "frames" / "0.safetensors").unlink()
        return finish(folder, *arguments)

    with monkeypatch.context() as changing:
        changing.setattr(RunFolder, "finish", without)
        outcome = command(*words, "baselines=0")
    assert outcome.code == 2
    assert "frames/0.safetensors was removed by another program during this run; run the command again" in outcome.err
    assert command(*words, "baselines=0").code == 0
    (trace,) = tmp_path.glob("*/trace.safetensors")
    assert len(Trace.load(trace).frames) == 2


def test_weights_that_are_replaced_or_removed_during_a_run_are_still_those_that_were_loaded(
    saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    lm = dllm.load(folder)
    before = lm.backbone.fingerprint()
    (tmp_path / "new").write_bytes(doubled(folder / "model.safetensors"))
    (tmp_path / "new").replace(folder / "model.safetensors")
    identity.check_weights(lm)
    (folder / "model.safetensors").unlink()
    identity.check_weights(lm)
    assert lm.backbone.fingerprint() == before


def test_a_guide_that_is_replaced_during_a_run_judges_no_more_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide, add = shutil.copytree(BUNDLED / "tiny-guide", tmp_path / "guide"), Journal.add
    (tmp_path / "new").write_bytes(doubled(guide / "model.safetensors"))
    words = ("evaluate", "sampler=ar_guided", f"sampler.guide={guide}", f"out={tmp_path / 'out'}", "task.limit=3")

    def replaced(journal: Journal, kind: str, name: str, value: Any) -> None:
        add(journal, kind, name, value)
        if kind == "record" and (tmp_path / "new").exists():
            (tmp_path / "new").replace(guide / "model.safetensors")

    monkeypatch.setattr(Journal, "add", replaced)
    outcome = command(*words, "batch_size=1", "baselines=0", "frames=0", *SHORT)
    assert outcome.code == 2
    assert f"{guide / 'model.safetensors'} was changed by another program during this run" in outcome.err
    (journal,) = tmp_path.glob("out/*/journal.jsonl")
    assert journal.read_text().count('"kind": "record"') == 1


def test_a_bundled_file_is_the_same_in_every_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("evaluate", "sampler=learn2pd", "task.limit=1", "baselines=0", "frames=0", "gen_length=32")
    assert command(*words, f"out={tmp_path / 'new'}").code == 0
    (folder,) = (tmp_path / "new").iterdir()
    found = json.loads((folder / "results.json").read_text())
    assert "checkpoints/tiny-llada/learn2pd.safetensors" in found["files"]
    assert not any(Path(name).is_absolute() for name in found["files"])
    # An earlier version had the path of the installation, and its runs are read.
    earlier = found | {"files": {str(BUNDLED.parent / name): content for name, content in found["files"].items()}}
    names = "model loading task sampler cache options asked files".split()
    place = RunFolder(tmp_path / "old", found["label"], {name: earlier[name] for name in names}).path
    shutil.copytree(folder, place)
    (place / "results.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(Journal, "__init__", lambda *_, **__: pytest.fail("a run was started"))
    for out in ("new", "old"):
        assert command(*words, f"out={tmp_path / out}").code == 0


def test_the_journal_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Journal.add

    def interrupted(journal: Journal, kind: str, name: str, value: Any) -> None:
        add(journal, kind, name, value)
        if kind == "record":
            raise KeyboardInterrupt

    words = ("evaluate", f"out={tmp_path}", "task.limit=2", "baselines=0", "frames=0", *SHORT)
    with monkeypatch.context() as changing:
        changing.setattr(Journal, "add", interrupted)
        for sampler in ("vanilla", "threshold"):
            assert command(*words, f"sampler={sampler}").code == 130
    one, other = (next(tmp_path.glob(f"{name}-*/journal.jsonl")) for name in ("vanilla", "threshold"))
    kept = other.read_bytes()
    shutil.copy(one, other)
    outcome = command(*words, "sampler=threshold")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert (
        f"{other} is not a journal of a run, or damaged, in line 1 (it is of another run, or was changed)"
        in outcome.err
    )
    other.write_bytes(kept)
    assert command(*words, "sampler=threshold").code == 0


def test_a_filter_that_is_written_over_is_still_the_one_that_was_loaded(tmp_path: Path) -> None:
    file = shutil.copy(BUNDLED / "tiny-llada" / "learn2pd.safetensors", tmp_path / "filter.safetensors")
    loaded = load_filter(file).network.state_dict()
    before = {name: tensor.clone() for name, tensor in loaded.items()}
    content = doubled(file)
    with file.open("r+b") as opened:
        opened.write(content)
    assert all(torch.equal(loaded[name], before[name]) for name in before)


def test_data_that_changes_before_it_is_asked_about_is_not_taken_for_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([{"data": "a"}, {"data": "b"}, {"data": "a"}, {"data": "a"}])
    monkeypatch.setattr(WordProblems, "check", lambda self: next(found))
    words = ("evaluate", f"out={tmp_path}", "task.limit=1", "baselines=0", "frames=0", *SHORT)
    outcome = command(*words)
    assert outcome.code == 2
    assert "task=word_problems was changed by another program during this run; run the command again" in outcome.err
    (journal,) = tmp_path.glob("*/journal.jsonl")
    assert not journal.read_text()
    assert command(*words).code == 0


def test_a_word_is_no_file_whatever_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clean").mkdir()
    for name in ("auto", "rows.txt", "dllm.cache.FreeCache"):
        (tmp_path / name).write_text("x")
    assert identity.contents({"freeze": "clean", "dtype": ["auto"], "_target_": "dllm.cache.FreeCache"}) == {}
    assert set(identity.contents(["rows.txt", {"a": "./auto"}, str(tmp_path / "clean")])) == {
        "rows.txt", "./auto", str(tmp_path / "clean"),
    }  # fmt: skip
    assert set(identity.contents(["clean", "auto"], paths=True)) == {"clean", "auto"}


@pytest.mark.parametrize("written", ["file://{}", "file:{}", "local://{}", "zip://a.jsonl::file://{}", "{}"])
def test_a_url_of_a_file_is_known_by_its_content(written: str, tmp_path: Path) -> None:
    file = tmp_path / "rows"
    found = []
    for content in ("one", "two"):
        file.write_text(content)
        found.append(identity.contents({"test": written.format(file)}))
    assert found[0] != found[1]
    assert list(found[0]) == [str(file)]


def test_what_lies_here_by_the_name_of_an_option_makes_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("evaluate", "out=out", "task.limit=1", "gen_length=8", "baselines=0", "frames=0", "cache=freecache")
    for _ in range(2):
        assert command(*asked, "cache.freeze=clean", "model.dtype=auto").code == 0
        for name in ("clean", "auto"):
            (tmp_path / name).write_text("x")
    assert len(list((tmp_path / "out").glob("*/results.json"))) == 1


def test_the_same_weights_are_one_run_however_their_folder_is_written(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, "model")
    asked = ("evaluate", "out=out", "task.limit=1", "gen_length=8", "baselines=0", "frames=0")
    for written in ("model", str(tmp_path / "model"), "./model/", "out/../model"):
        outcome = command(*asked, f"model.path={written}")
        assert outcome.code == 0, outcome.err
    (file,) = (tmp_path / "out").glob("*/results.json")
    assert json.loads(file.read_text())["loading"]["path"] == "model"


def test_runs_from_before_keep_the_path_that_was_typed(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("evaluate", f"out={tmp_path}", "task.limit=1", "gen_length=8", "baselines=0", "frames=0")
    monkeypatch.setattr(evaluate, "_by_name", lambda asked: asked)
    assert command(*asked, f"model.path={saved}").code == 0
    monkeypatch.undo()
    assert command(*asked, f"model.path={saved}").code == 0
    (file,) = tmp_path.glob("*/results.json")
    assert json.loads(file.read_text())["loading"]["path"] == str(saved)


def test_answers_of_versions_that_knew_no_code_go_on() -> None:
    code = {"files of sampler": "0123"}
    assert differences({"seed": 1}, {"seed": 1} | code) == []
    assert differences({"seed": 1} | code, {"seed": 1, "files of sampler": "4567"}) == ["files of sampler"]
    assert differences({"seed": 1} | code, {"seed": 1}) == ["files of sampler"]
