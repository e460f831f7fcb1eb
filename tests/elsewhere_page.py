"""Reads docs/coming-from-elsewhere.md: its tables are rules that translate a call of other code, its blocks such calls.

A row of a table is a rule. Its first cell says when it applies: `name` where the other code is given or defaults to a
value that is not none, `name=value` where to that value, `name()` where that function is called; several all together.
Its third cell says what is set here: `option` to the value of the first name, `option=value` to that value, in which
`<name>` stands for the value of a name. A dash says that nothing here does it. Rules apply from top to bottom; one that
chooses a sampler or a cache drops the options of the one before.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import dllm
from dllm.cache.base import Cache
from dllm.resolve import build, options_of, with_option
from dllm.samplers.base import Sampler

PAGE = Path(__file__).parents[1] / "docs" / "coming-from-elsewhere.md"
HEADER = ["theirs", "default", "ours", "default", "remarks"]
NOTHING = "\N{EN DASH}"
Settings = dict[str, Any]


class NoCounterpartError(Exception):
    """Nothing here does what the other code was told to do."""


class Call(NamedTuple):
    """The functions that other code is called by, and what they are given."""

    functions: frozenset[str]
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of a table: code in cells, without its quotes."""

    section: str
    theirs: tuple[str, ...]
    default: str
    ours: tuple[str, ...]
    our_default: str
    nothing: bool

    def applies(self, call: Call, defaults: Mapping[str, Any]) -> bool:
        """Whether a call meets every condition of the first cell."""
        return all(self._met(condition, call, defaults) for condition in self.theirs)

    @staticmethod
    def _met(condition: str, call: Call, defaults: Mapping[str, Any]) -> bool:
        name, assigned, value = condition.partition("=")
        if name.endswith("()"):
            return name[:-2] in call.functions
        actual = call.given.get(name, defaults.get(name))
        return actual == literal(value) if assigned else actual is not None

    def asked(self, call: Call, defaults: Mapping[str, Any]) -> bool:
        """Whether a call asks for what this row is about, by anything but its default."""
        name, assigned, _ = self.theirs[0].partition("=")
        other = bool(assigned) or call.given.get(name) != defaults.get(name)
        return name in call.given and other and self.applies(call, defaults)


@dataclass(frozen=True)
class Section:
    """A part of the page: its rows, and its fenced blocks as (language, text)."""

    rows: list[Row]
    blocks: list[tuple[str, str]]
    text: str

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """What the other code takes for what it is not given."""
        named = [(row.theirs[0].partition("=")[0], row.default) for row in self.rows if row.theirs and row.default]
        return {name: literal(value) for name, value in reversed(named)}

    @cached_property
    def names(self) -> set[str]:
        """Every option of the other code that a row names."""
        return {each.partition("=")[0] for row in self.rows for each in row.theirs}

    def translate(self, call: Call) -> tuple[Settings, list[Row]]:
        """What is set here for a call, and the rows that say so.

        Raises:
            NoCounterpartError: a row with a dash applies.
        """
        settings: Settings = {}
        defaults, used = self.defaults, []
        for row in self.rows:
            if row.nothing and row.asked(call, defaults):
                raise NoCounterpartError(row.theirs[0])
            if not row.ours or not row.applies(call, defaults):
                continue
            used.append(row)
            values = defaults | call.given
            for each in row.ours:
                name, assigned, value = each.partition("=")
                if name in ("sampler", "cache"):
                    settings = {key: kept for key, kept in settings.items() if not key.startswith(f"{name}.")}
                given = values[row.theirs[0].partition("=")[0]] if not assigned else None
                settings[name] = setting(_filled(value, values)) if assigned else given
        return settings, used


def _filled(text: str, values: Mapping[str, Any]) -> str:
    return re.sub(r"<([\w.]+)>", lambda found: str(values[found[1]]), text)


@cache
def literal(text: str) -> Any:
    """A value as Python or YAML writes it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return yaml.safe_load(text)


@cache
def setting(text: str) -> Any:
    """A value as a command takes it."""
    return OverridesParser.create().parse_override(f"x={text}").value()


def sections() -> dict[str, Section]:
    """The parts of the page by their headings."""
    found = {}
    for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        found[title] = Section(list(_rows(title, text)), blocks, text)
    return found


def _rows(section: str, text: str) -> Iterator[Row]:
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells == HEADER:
            inside = True
        elif not cells:
            inside = False
        elif inside and set(line) - set("|-: "):
            assert len(cells) == len(HEADER), line
            theirs, default, ours, our_default, _ = cells
            options = _code(ours) if re.fullmatch(r"(`[^`]+`\s*)+", ours) else ()  # words: nothing needs to be set
            yield Row(section, _code(theirs), default.strip("`"), options, our_default.strip("`"), ours == NOTHING)


def _code(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def resolved(settings: Settings) -> tuple[Any, Any, Any]:
    """The sampler, the cache and the options of a run with these settings; those of models, files, ... are left out."""
    chosen = {}
    for group, kind in (("sampler", Sampler), ("cache", Cache)):
        options = options_of(group, settings.get(group, {"sampler": "vanilla", "cache": "none"}[group]))
        for name, value in settings.items():
            if name.startswith(f"{group}."):
                options = with_option(group, options, name.partition(".")[2], value)
        chosen[group] = build(group, options, kind)
    own = {name: settings[name] for name in vars(dllm.Options()) if name in settings and name != "batch_size"}
    return chosen["sampler"], chosen["cache"], dllm.Options(**own | {"seed": None})


def python_call(source: str) -> Call:
    """All calls in Python source: the functions, and their arguments that are constants."""
    functions, given = set(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            functions.add(node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", ""))
            for each in node.keywords:
                if each.arg and isinstance(each.value, ast.Constant | ast.UnaryOp | ast.List):
                    given[each.arg] = ast.literal_eval(each.value)
    return Call(frozenset(functions), given)


def shell_settings(command: str) -> Settings:
    """The `name=value` and `--name value` arguments of a command."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    settings = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            settings[word] = True if following.startswith("--") else literal(following)
        elif "=" in word:
            name, _, value = word.partition("=")
            settings[name] = setting(value) if re.fullmatch(r"[-\w./:{},]*", value) else value
    return settings
