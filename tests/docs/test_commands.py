"""The commands that the documentation shows: their options and choices exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllm.scripts import cli, flags, usage

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "models").glob("*.md")])
OWN = {"margin", "mine", "$sampler"}  # policies that a page writes, or goes through


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page, after `dllm`."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ {4,}(?:time )?dllm ([a-z-]+ .*)$", text, re.MULTILINE):
        words = shlex.split(re.sub(r"\s#.*", "", line))
        if words[0] in cli.COMMANDS:
            yield words


def known(name: str, choices: dict[str, str]) -> set[str]:
    """The options of a command, with those of the choices of its groups."""
    found = set(usage.options(name))
    for group, chosen in choices.items():
        for choice in chosen.split(","):
            other = choice if choice in usage.choices(group) else flags.OTHERS.get(group, (choice, ""))[0]
            found |= {f"{group}.{option}" for option in usage.entries(f"{group}/{other}")} if other != "null" else set()
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_name_options_and_choices_that_exist(page: Path) -> None:
    for command, *words in commands(page):
        name = cli.module(command)
        given = [word.lstrip("+").partition("=")[::2] for word in words if "=" in word and not word.startswith("-")]
        defaults = usage.groups(name)
        choices = defaults | {option: value for option, value in given if option in defaults}
        for group in {"sampler", "cache", "sweep"} & choices.keys():
            assert set(choices[group].split(",")) <= {*usage.choices(group), "null", *OWN}
        if OWN & set(choices.get("sampler", "").split(",")):
            continue
        options = known(name, choices)
        for option, _ in given:
            assert option.startswith("hydra") or any(
                option == each or option.startswith(f"{each}.") for each in options
            ), (command, option)
