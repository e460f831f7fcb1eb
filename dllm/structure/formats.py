"""The option `response_format`: what the text of an answer has to be.

The values are OpenAI's, and three more:

    {"type": "text"}                                            anything, as null
    {"type": "json_object", "depth": 3}                         a JSON object that nests to a depth
    {"type": "json_schema", "json_schema": {"schema": {...}}}   JSON that is valid under a schema, or "schema": {...}
    {"type": "regex", "regex": "..."}                           a match of a regular expression as a whole
    {"type": "choice", "choice": ["...", ...]}                  one of some texts
    {"type": "grammar", "grammar": "...", "depth": 3}           a text that a Lark grammar derives
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm.checks import choice, is_text, known, number
from dllm.files import check_readable, expanded, parse_json, read_json
from dllm.structure.compiled import Compiled, compiled
from dllm.structure.grammar import grammar_regex
from dllm.structure.language import check_closed, compile_regex, escaped, without_anchors
from dllm.structure.schema import Part, object_regex, scaffold, schema_regex

TYPES = ("text", "json_object", "json_schema", "regex", "choice", "grammar")
_DEPTH = 3
_SMALL = 10_000  # characters of texts that need no process of their own
_FIELDS = {
    "text": (),
    "json_object": ("depth",),
    "json_schema": ("json_schema", "schema", "depth", "scaffold", "value_length"),
    "regex": ("regex",),
    "choice": ("choice",),
    "grammar": ("grammar", "depth"),
}
_NAME = "response_format"


@dataclass(frozen=True, eq=False)
class ResponseFormat:
    """A format, checked as far as no library is needed.

    Attributes:
        kind: one of `TYPES`.
        body: the schema, the expression, the texts or the grammar.
        depth: how deep what is recursive nests.
        scaffold: give what all answers share, and generate the values only.
        value_length: positions of each value of a scaffold, for all or by path; None divides what there is.
    """

    kind: str
    body: Any = None
    depth: int = _DEPTH
    scaffold: bool = False
    value_length: int | Mapping[str, int] | None = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{_NAME} of type {self.kind}"

    @cached_property
    def key(self) -> str:
        """Equal for equal languages."""
        lengths = self.value_length if self.scaffold else None
        return json.dumps([self.kind, self.body, self.depth, self.scaffold, lengths])

    @cached_property
    def regex(self) -> str:
        """The regular expression of the texts.

        Raises:
            ValueError: a schema or a grammar that is not supported.
        """
        try:
            return self._translated()
        except ValueError as error:
            raise ValueError(f"{_NAME}: {str(error).removeprefix(_NAME + ': ')}") from None
        except RecursionError:
            raise ValueError(f"{self.name} is nested too deeply; use a flatter one") from None

    def _translated(self) -> str:
        match self.kind:
            case "json_object":
                return object_regex(self.depth)
            case "json_schema" if self.scaffold:
                return "".join(f"(?:{part.regex})[ ]*" if part.regex else escaped(part.text) for part in self.parts)
            case "json_schema":
                return schema_regex(self.body, self.depth)
            case "choice":
                return "|".join(map(escaped, self.body))
            case "grammar":
                return grammar_regex(self.body, self.depth)
            case _:
                return str(self.body)

    @cached_property
    def compiled(self) -> Compiled:
        """The automaton of the texts, and the parts of a scaffold.

        Raises:
            ValueError: a format that is not supported, or takes too much time or memory.
        """
        if self.kind == "choice" and len(self.regex) <= _SMALL:  # at most a state for each letter
            return Compiled(compile_regex(self.regex, self.name), [])
        return compiled(self.key, self.name)

    @cached_property
    def parts(self) -> list[Part]:
        """Of a scaffold: what is given and the values, in their order."""
        return scaffold(self.body, self.depth)


def read_format(value: Any) -> ResponseFormat | None:
    """The format that an option says; None for any text.

    Args:
        value: a mapping, the path of a JSON file with one, a `ResponseFormat`, or None.

    Raises:
        ValueError: an unknown type or field, or a value of the wrong type.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    value = read_format_file(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"{_NAME}={value!r} is of the wrong type; give a mapping with a type, a JSON file, or null")
    if "type" not in value:
        raise ValueError(f"{_NAME} has no type; give one of {', '.join(TYPES)}")
    kind = value["type"]
    choice(f"{_NAME}.type", kind if isinstance(kind, str) else repr(kind), TYPES)
    known([name for name in value if name != "type"], _FIELDS[kind], f"{_NAME}.")
    if kind == "text":
        return None
    form = _read(kind, value)
    form.compiled  # noqa: B018  # rejects what is not supported before a model is loaded
    return form


def _read(kind: str, value: Mapping[str, Any]) -> ResponseFormat:
    depth = value.get("depth", _DEPTH)
    number(f"{_NAME}.depth", depth, "a whole number from 1 to 8", low=1, high=8, whole=True)
    if kind == "json_schema":
        return _schema_format(value, depth)
    if kind == "json_object":
        return ResponseFormat(kind, depth=depth)
    return ResponseFormat(kind, _body(kind, value), depth)


def read_format_file(given: Any) -> Any:
    """The format in a JSON file, or in a text that begins with a brace; other values as they are.

    Raises:
        ValueError: it cannot be read.
    """
    if not isinstance(given, (str, Path)):
        return given
    if isinstance(given, str) and given.startswith("{"):
        try:
            return parse_json(given, once=True)
        except ValueError as error:
            raise ValueError(f"{_NAME}={given!r} is not JSON ({error}); correct it") from None
    check_readable(_NAME, expanded(given), "the path of a JSON file, or a mapping with a type")
    try:
        return read_json(expanded(given), "give the path of a JSON file with a type")
    except ValueError as error:
        raise ValueError(f"{_NAME}={str(given)!r} cannot be read: {error}") from None


def _schema_format(value: Mapping[str, Any], depth: int) -> ResponseFormat:
    if ("schema" in value) == ("json_schema" in value):
        raise ValueError(f"{_NAME} of type json_schema needs json_schema or schema; give one of them")
    schema = value.get("schema")
    if "json_schema" in value:
        named = value["json_schema"]
        if not isinstance(named, Mapping) or "schema" not in named:
            raise ValueError(f"{_NAME}.json_schema has no schema; give {{'name': ..., 'schema': {{...}}}}")
        known(named, ("name", "description", "schema", "strict"), f"{_NAME}.json_schema.")
        schema = named["schema"]
    if not isinstance(schema, (Mapping, bool)):
        raise ValueError(f"{_NAME}.schema={schema!r} is of the wrong type; give a JSON schema")
    given = value.get("scaffold", False)
    choice(f"{_NAME}.scaffold", given, (True, False))
    lengths = value.get("value_length")
    if lengths is not None and not given:
        raise ValueError(f"{_NAME}.value_length has no effect without scaffold; set it, too, or leave it out")
    each = lengths if isinstance(lengths, Mapping) else {"": lengths} if lengths is not None else {}
    for name, length in each.items():
        use = "a whole number of at least 1, a mapping of them, or null"
        number(f"{_NAME}.value_length{name and '.' + name}", length, use, low=1, high=10**6, whole=True)
    schema = _plain(schema)
    if not is_text(json.dumps(schema, ensure_ascii=False)):
        raise ValueError(f"{_NAME}.schema has text that is not valid UTF-8; give UTF-8")
    return ResponseFormat("json_schema", schema, depth, given, _plain(lengths))


def _body(kind: str, value: Mapping[str, Any]) -> Any:
    if kind not in value:
        raise ValueError(f"{_NAME} of type {kind} has no {kind}; give it")
    body = value[kind]
    if kind == "choice":
        if isinstance(body, (str, Mapping)) or not hasattr(body, "__iter__") or not list(body):
            raise ValueError(f"{_NAME}.choice={body!r} is of the wrong type; give a list of texts, at least one")
        body = list(body)
        texts = body
    else:
        texts = [body]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{_NAME}.{kind}={text!r} is of the wrong type; give text")
        if not is_text(text):
            raise ValueError(f"{_NAME}.{kind}={text!r} is not valid UTF-8; give UTF-8")
        if kind == "choice" and "\0" in text:
            raise ValueError(f"{_NAME}.{kind}={text!r} has a null character, which no answer has; leave it out")
    if kind == "regex":
        check_closed(body, f"{_NAME}.regex={body!r}")
        try:
            body = without_anchors(body)
        except ValueError as error:
            raise ValueError(f"{_NAME}.regex={body!r}: {error}") from None
    return body


def _plain(value: Any) -> Any:
    """Mappings and sequences of any kind as those of JSON.

    Raises:
        ValueError: what JSON cannot say.
    """
    try:
        return json.loads(json.dumps(value, default=_container, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{_NAME} is not JSON ({why}); give what JSON can say") from None


def _container(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "__iter__"):
        return list(value)
    raise TypeError(f"{value!r} is of the wrong type")
