"""`dllm completion`: what bash is told is what a command takes, without an import that takes seconds."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands import command
from dllm.resolve import names, variants
from dllm.scripts import completion, flags, usage
from dllm.scripts.cli import COMMANDS, OTHERS, module

BASH = shutil.which("bash")
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def words(*line: str) -> list[str]:
    """What the last word can be completed to."""
    return list(completion.candidates(line[:-1], line[-1])[0])


def bash(folder: Path, *lines: str) -> list[list[str]]:
    """The replies of bash to lines, each as its words, with the cursor at the end of the last."""
    script = ['source <(dllm completion bash); IFS=$"\\n"']
    for line in lines:
        script.append(f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _dllm")
        script.append('printf "%s\\n" "${COMPREPLY[@]}"; echo ----')
    asked = [str(BASH), "--norc", "-c", "\n".join(script)]
    own = ENVIRONMENT | {"HOME": str(folder)}
    told = subprocess.run(asked, cwd=folder, env=own, capture_output=True, text=True, timeout=120, check=True)
    assert told.stderr == ""
    return [part.split("\n")[:-1] for part in told.stdout.replace("----\n", "\0").split("\0")[:-1]]


@pytest.mark.skipif(BASH is None, reason="no bash")
def test_bash_completes_commands_options_groups_values_and_files(tmp_path: Path) -> None:
    (tmp_path / "my questions.jsonl").touch()
    (tmp_path / "answers").mkdir()
    (tmp_path / "conf" / "sampler").mkdir(parents=True)
    (tmp_path / "conf" / "sampler" / "mine.yaml").write_text("# My own.\n_target_: mine.Mine\nmargin: 0.9  # of mine\n")
    expected = {
        "dllm gen": ["generate"],
        "dllm bench": ["bench", "bench-serve"],
        "dllm nope ''": ["answers/", "conf/", "my questions.jsonl"],
        "dllm completion ''": ["bash", "zsh", "fish"],
        # Bash splits words at = and :, unless told otherwise.
        "dllm generate sampler = tiny/th": ["tiny/threshold"],
        "dllm generate sampler=tiny/th": ["sampler=tiny/threshold"],
        "dllm generate sampler = local": ["localleap"],
        "dllm evaluate -m cache = none,sub": ["none,sub_blocks"],
        "dllm generate sampler = localleap sampler.r": ["sampler.relaxed_threshold=", "sampler.radius="],
        "dllm generate sampler.to": ["sampler.tokens_per_step="],
        "dllm generate gen": ["gen_length="],
        "dllm generate gen_length = 5 gen": [],
        "dllm generate chat =": ["false", "true"],
        "dllm generate show = li": ["live", "lines"],
        "dllm generate model.device = cuda :": ["1"],
        "dllm generate input = m": ["my questions.jsonl"],
        "dllm generate output = ": ["answers/", "conf/", "my questions.jsonl"],
        "dllm generate sampler = threshold sampler.calibration = a": ["answers/"],
        "dllm generate model = ./a": ["./answers/"],
        "dllm report a": ["answers/"],
        "dllm generate --config-dir conf sampler = mi": ["mine"],
        "dllm generate --config-dir conf sampler = mine sampler.": ["sampler.margin="],
        "dllm generate --config-dir a": ["answers/"],
        "dllm generate --cfg ''": ["job", "hydra", "all"],
        "dllm generate --mul": ["--multirun"],
        "dllm results 'samplers=[klass,tiny/wi'": ["samplers=[klass,tiny/wino"],
        # Words are as they were typed: with their quotes, the last of which may be open, and with ~.
        """dllm results "'samplers=[klass,tiny/wi" """: ["samplers=[klass,tiny/wino"],
        """dllm generate '"my'\\ folder'"' input = 'my\\ q'""": ["my questions.jsonl"],
        "dllm generate --config-dir \\~/conf sampler = mi": ["mine"],
        "dllm generate nope =": [],
    }
    found = bash(tmp_path, *expected)
    assert dict(zip(expected, found, strict=True)) == {line: reply or [""] for line, reply in expected.items()}


FISH, ZSH = shutil.which("fish"), shutil.which("zsh")


@pytest.mark.skipif(FISH is None, reason="no fish")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dllm gen", ["generate"]),
        ("dllm generate sampler=tiny/th", ["sampler=tiny/threshold"]),
        ("dllm generate sampler=localleap sampler.r", ["sampler.radius=", "sampler.relaxed_threshold="]),
        ("dllm evaluate -m cache=none,sub", ["cache=none,sub_blocks"]),
        ("dllm completion ", ["bash", "fish", "zsh"]),
        ("dllm generate input=my", ["input=my questions.jsonl"]),
    ],
)
def test_fish_completes_as_bash_does(line: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "my questions.jsonl").touch()
    script = f"dllm completion fish | source; complete -C {shlex.quote(line)}"
    asked = [str(FISH), "--no-config", "-c", script]
    own = ENVIRONMENT | {"HOME": str(tmp_path)}
    told = subprocess.run(asked, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=120, check=True)
    assert [word.partition("\t")[0] for word in told.stdout.splitlines()] == expected


@pytest.mark.skipif(ZSH is None, reason="no zsh")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dllm gen", "dllm generate "),
        ("dllm generate sampler=tiny/th", "dllm generate sampler=tiny/threshold "),
        ("dllm generate gen_l", "dllm generate gen_length="),
        ("dllm evaluate -m cache=none,sub", "dllm evaluate -m cache=none,sub_blocks "),
        ("dllm generate input=m", "dllm generate input=my\\ questions.jsonl "),
        ("dllm generate sampler=localleap sampler.", "sampler.radius=  positions on either side that count as near"),
    ],
)
def test_zsh_completes_as_bash_does(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "my questions.jsonl").touch()
    # Completion needs a terminal, which zsh gives another zsh.
    script = f"""
zmodload zsh/zpty
zpty -b inner {ZSH} -f -i
zpty -w inner 'PS1=; stty cols 200; autoload -Uz compinit; compinit -u; source <(dllm completion zsh); print re""ady'
zpty -r -m inner word '*ready*' || exit 1
zpty -w -n inner {shlex.quote(line)}$'\\t'
repeat 150; do
    while zpty -r -t inner word; do print -rn -- $word; done
    sleep 0.02
done
"""
    own = ENVIRONMENT | {"HOME": str(tmp_path), "TERM": "dumb"}
    asked = [str(ZSH), "-f", "-c", script]
    told = subprocess.run(asked, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=120, check=True)
    assert expected in told.stdout.replace("\a", "")  # it rings where several words are possible


class TestWords:
    def test_first_are_all_commands(self) -> None:
        assert words("") == [*COMMANDS, *OTHERS, "--help", "--version"]

    @pytest.mark.parametrize("name", COMMANDS)
    def test_of_a_command_are_its_options_and_groups(self, name: str) -> None:
        found = words(name, "")
        assert {word.removesuffix("=") for word in found if word.endswith("=")} == set(usage.options(module(name)))
        for group in usage.groups(module(name)):
            assert words(name, f"{group}=") == [f"{group}={each}" for each in names(group) + variants(group)]
        assert set(words(name, "-")) == set(flags.known())

    @pytest.mark.parametrize("name", COMMANDS)
    def test_of_every_option_begin_with_what_was_typed(self, name: str) -> None:
        for option in usage.options(module(name)):
            for begun in (option, f"{option}=", f"{option}=n", f"{option}=[", f"{option}=x,"):
                assert all(word.startswith(begun) for word in words(name, begun))

    @pytest.mark.parametrize("group", ["sampler", "cache"])
    def test_of_every_choice_are_its_options(self, group: str) -> None:
        for choice in names(group) + variants(group):
            found = words("generate", f"{group}={choice}", f"{group}.")
            assert found == [f"{group}.{option}=" for option in usage.entries(f"{group}/{choice}")]

    @pytest.mark.parametrize(
        ("option", "values"),
        [
            ("order", ["low_confidence", "margin", "entropy", "random", "left_to_right"]),
            ("schedule", ["uniform", "timestep"]),
            ("tokens_per_step", ["1"]),
            ("steps", ["null"]),
        ],
    )
    def test_of_an_option_are_its_default_and_the_values_that_its_line_names(
        self, option: str, values: list[str]
    ) -> None:
        assert words("generate", f"sampler.{option}=") == [f"sampler.{option}={value}" for value in values]

    def test_of_a_policy_over_another_are_the_policies(self) -> None:
        assert "sampler.base=tiny/threshold" in words("generate", "sampler=freedave", "sampler.base=")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts_are_accepted_by_their_shells(shell: str) -> None:
    printed = command("completion", shell)
    assert (printed.code, printed.err) == (0, "")
    assert f"dllm completion {shell} " in printed.out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=printed.out, text=True, timeout=60, check=True)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_what_words_mean(shell: str) -> None:
    told = command("completion", shell, "2", "dllm", "generate", "sampler=localle").out
    assert (
        told == "sampler=localleap\tLocalLeap: confident tokens are anchors, and a lower threshold applies near them.\n"
    )
    assert command("completion", shell, "1", "dllm").out.startswith("generate\tGenerate from a prompt, ")
    # An empty line would be a word.
    assert command("completion", shell, "2", "dllm", "generate", "nope=").out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tcsh"], "dllm completion: error: unknown shell 'tcsh'; expected one of bash, zsh, fish\n"),
        (["bash", "x"], "dllm completion: error: 'x' is not the number of a word; use dllm completion bash\n"),
    ],
)
def test_bad_input_ends_in_one_line(arguments: list[str], message: str) -> None:
    result = command("completion", *arguments)
    assert (result.code, result.out, result.err) == (2, "", message)


@pytest.mark.parametrize("arguments", [["completion", "bash", "2", "dllm", "generate", "sampler="], ["generate", "-h"]])
def test_nothing_slow_is_imported(arguments: list[str]) -> None:
    script = f"""
import sys, dllm.scripts.cli
sys.argv = {["dllm", *arguments]!r}
dllm.scripts.cli.main()
print(*sorted({{"torch", "transformers", "hydra", "omegaconf", "numpy", "datasets"}} & set(sys.modules)))
"""
    ran = subprocess.check_output([sys.executable, "-c", script], text=True, timeout=120)
    assert ran.splitlines()[-1] == "", shlex.join(arguments)


@pytest.mark.parametrize("arguments", [["completion"], ["completion", "--help"]])
def test_says_how_it_is_installed(arguments: list[str]) -> None:
    told = command(*arguments)
    assert (told.code, told.err) == (0, "")
    assert 'eval "$(dllm completion bash)"' in told.out
    assert max(map(len, told.out.splitlines())) <= 120
