"""What the built distributions contain, and that an installed wheel generates without the repository."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from dllm.tasks import word_problems

ROOT = Path(__file__).parents[1]
# Where each source folder is installed.
FOLDERS = {
    "dllm": "dllm",
    "samplers": "dllm/samplers",
    "cache": "dllm/cache",
    "conf": "dllm/conf",
    "scripts": "dllm/scripts",
}
SOURCES = {".py", ".yaml", ".css", ".js", ".jinja", ".html", ".svg"}
BUNDLED = {"tiny-llada", "tiny-dream", "tiny-guide", "tiny-block"}
LARGEST_WHEEL = 25 * 2**20

# One worker builds and installs once for all.
pytestmark = pytest.mark.xdist_group("packaging")


def shipped_sources() -> dict[str, str]:
    """Every file of the repository that belongs in a wheel, and its place there."""
    files = {}
    for folder, place in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            inside = path.relative_to(ROOT / folder)
            wanted = path.suffix in SOURCES or path.name == "py.typed" or inside.parts[0] == "checkpoints"
            if path.is_file() and wanted and "__pycache__" not in inside.parts:
                files[f"{folder}/{inside.as_posix()}"] = f"{place}/{inside.as_posix()}"
    return files


def run(command: list[str | Path], cwd: Path) -> str:
    """Run a command as a stranger would: offline, and without this environment's Python settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@dataclass(frozen=True)
class Distributions:
    wheel: Path
    sdist: Path

    @property
    def wheel_files(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    @property
    def sdist_files(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive if member.isfile()}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Build the sdist, and the wheel from the sdist, out of a copy: nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("dist")
    leave = shutil.ignore_patterns(".*", "build", "dist", "outputs", "multirun", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=leave)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source"], cwd=folder)
    return Distributions(wheel=next(folder.glob("*.whl")), sdist=next(folder.glob("*.tar.gz")))


@pytest.fixture(scope="module")
def installed(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel, and borrows only its dependencies."""
    env = tmp_path_factory.mktemp("installed") / "env"
    run([sys.executable, "-m", "venv", "--without-pip", env], cwd=env.parent)
    python = env / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", distributions.wheel], cwd=env.parent)
    # A folder named in a .pth is searched, but its own .pth files, and so an editable install, are not followed.
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=env.parent).strip())
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    borrowed |= {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return env / "bin"


def test_wheel_contains_every_source_file_and_nothing_else(distributions: Distributions) -> None:
    code = {name for name in distributions.wheel_files if ".dist-info/" not in name}
    assert code == set(shipped_sources().values())


def test_wheel_installs_a_single_top_level_package(distributions: Distributions) -> None:
    tops = {name.split("/")[0] for name in distributions.wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dllm"}


def test_wheel_carries_the_licence_and_stays_small(distributions: Distributions) -> None:
    assert any(re.fullmatch(r"[^/]+\.dist-info/licenses/LICENSE", name) for name in distributions.wheel_files)
    assert distributions.wheel.stat().st_size <= LARGEST_WHEEL


def test_wheel_carries_the_bundled_models_complete(distributions: Distributions) -> None:
    prefix = "dllm/checkpoints/"
    found = {name.removeprefix(prefix) for name in distributions.wheel_files if name.startswith(prefix)}
    needed = ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    assert found >= {f"{model}/{file}" for model in BUNDLED for file in needed}


def test_sdist_contains_what_building_and_testing_need(distributions: Distributions) -> None:
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    beside = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt"}
    assert distributions.sdist_files >= set(shipped_sources()) | tests | beside


def test_both_can_be_uploaded(distributions: Distributions) -> None:
    pytest.importorskip("twine")
    checked = run(
        [sys.executable, "-m", "twine", "check", "--strict", distributions.wheel, distributions.sdist],
        cwd=distributions.wheel.parent,
    )
    assert checked.count("PASSED") == 2


def test_metadata_say_what_is_installed(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert (metadata["Name"], metadata["License-Expression"]) == ("dllm-samplers", "Apache-2.0")
    assert metadata["Description-Content-Type"] == "text/markdown"
    described = metadata.get_payload()
    assert isinstance(described, str)
    assert described.startswith("# ")
    assert 20 < len(metadata["Summary"]) < 200
    extras = {"dev", "eval", "plot", "scale", "serve", "structure", "sweep"}
    assert set(metadata.get_all("Provides-Extra", [])) >= extras
    # Extras of extras are named as they are installed.
    needed = metadata.get_all("Requires-Dist", [])
    for own in (each for each in needed if each.startswith("dllm-samplers")):
        assert set(re.findall(r"\w+", own.partition("[")[2].partition("]")[0])) <= extras


def test_every_way_to_start_it_is_the_installed_one(installed: Path, tmp_path: Path) -> None:
    said = run([installed / "dllm", "--version"], cwd=tmp_path)
    assert said == run([installed / "python", "-m", "dllm", "--version"], cwd=tmp_path)
    place = run([installed / "python", "-c", "import dllm; print(dllm.__file__)"], cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.parent)
    words = run([installed / "dllm", "completion", "bash", "2", "dllm", "generate", "sampler=tiny/th"], cwd=tmp_path)
    assert words.splitlines() == ["words", "sampler=tiny/threshold"]


def test_installed_command_answers_the_default_problem(installed: Path, tmp_path: Path) -> None:
    problem = word_problems.problems(1, seed=0)[0]
    printed = run([installed / "dllm", "generate"], cwd=tmp_path)
    assert problem.question in printed
    assert f"The answer is {problem.answer}." in printed
    assert re.search(r"NFE \d+ .*TPF \d+\.\d+ .*tokens/s", printed)
    assert not list(tmp_path.iterdir()), "generating left files behind"


def test_installed_package_generates_from_python(installed: Path, tmp_path: Path) -> None:
    problem = word_problems.problems(1, seed=1_000_000)[0]
    script = f"""
import json, dllm
out = dllm.generate(dllm.load("tiny-llada"), [{problem.question!r}], sampler="threshold", gen_length=96)
print(json.dumps({{"file": dllm.__file__, "text": out.texts[0], "nfe": int(out.nfe[0])}}))
"""
    result = json.loads(run([installed / "python", "-c", script], cwd=tmp_path).splitlines()[-1])
    assert Path(result["file"]).is_relative_to(installed.parent)
    assert word_problems.grade(result["text"], problem).final
    assert 0 < result["nfe"] < 96
