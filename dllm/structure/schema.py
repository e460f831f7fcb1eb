"""A JSON schema as a regular expression of texts that are valid under it.

Every text that matches is valid; not every valid text matches. An object has its declared properties in their order
and no others, the optional ones may be left out; numbers and strings are written in their usual forms; a schema that
refers to itself is expanded to a bounded depth. Keywords that cannot be expressed are rejected by name and none is
ignored, which is why this is not outlines-core's `build_regex_from_schema`: that drops minimum, uniqueItems,
patternProperties and others in silence, and does not escape the names of properties.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from typing import Any
from urllib.parse import unquote

from dllm.structure.expressions import Dialect, translated
from dllm.structure.language import compile_regex, escaped, extra, without_anchors
from dllm.structure.numbers import integers, numbers

# White space within a text; it never matters.
_SPACE = "[ \\n]?"
_SAFE = '"\\\\\\x00-\\x1F\\x7F'  # what a string may not hold as it is
_LETTER = f'(?:[^{_SAFE}]|\\\\["\\\\/bfnrt])'
STRING = f'"{_LETTER}*"'
_NUMBER = "-?(?:0|[1-9][0-9]*)(?:\\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?"
# Classes are of ASCII; white space is that of ECMAScript or more where it is excluded.
_ASCII = {"d": "0-9", "w": "A-Za-z0-9_"}
_DIALECT = Dialect(
    {**_ASCII, "s": " "},
    {**_ASCII, "s": "\\s\\x{FEFF}"},
    _SAFE,
    f"[^{_SAFE}\\x{{2028}}\\x{{2029}}]",
    f"[^{_SAFE}]",
    closing=False,
)
_DATE = (
    "[12][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": f"{_OCTET}(?:\\.{_OCTET}){{3}}",
    "email": "[a-z0-9]+(?:[._-][a-z0-9]+)*@[a-z0-9]+(?:-[a-z0-9]+)*(?:\\.[a-z]{2,})+",
}
_NOTES = frozenset(
    "title description default examples example $schema $id $comment $anchor deprecated readOnly writeOnly $defs "
    "definitions discriminator".split()
)
_OF_TYPE = {
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems", "uniqueItems")),
    "object": frozenset(("properties", "required", "additionalProperties", "minProperties", "maxProperties")),
}
_VALUES = frozenset(("enum", "const", "default", "examples", "example"))  # hold values, not schemas
_BY_NAME = frozenset(("properties", "patternProperties", "dependentSchemas", "$defs", "definitions"))
_WITHIN = frozenset(("minContains", "maxContains", "then", "else"))  # parts of other keywords
_OF_NUMBERS = frozenset(("int32", "int64", "float", "double"))
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_COMBINED = ("$ref", "anyOf", "oneOf", "allOf")
_LONGEST, _MOST_PARTS = 2_000_000, 50_000  # characters of an expression; parts, each counted as often as it is reached


@dataclass(frozen=True)
class Part:
    """A part of a scaffold.

    Attributes:
        text: what is given; empty for a value.
        regex: of a value; empty for given text.
        path: of the value in the answer, such as "address.city".
        texts: all of a value that has few; none of one that has many.
    """

    text: str = ""
    regex: str = ""
    path: str = ""
    texts: tuple[str, ...] = ()


def schema_regex(schema: Any, depth: int) -> str:
    """The expression of the texts that a schema allows.

    Args:
        schema: as parsed from JSON.
        depth: how often a schema may contain itself, and how deep values nest that it does not describe.

    Raises:
        ValueError: an invalid schema, or a keyword that is not supported.
    """
    regex = _of(schema).value(schema, "", depth)
    if regex is None:
        raise ValueError(f"json_schema has no value that ends within depth={depth}; use a larger depth")
    return regex


def scaffold(schema: Any, depth: int) -> list[Part]:
    """The text that all values of a schema share, with every property, and the values to fill in.

    Raises:
        ValueError: as `schema_regex`.
    """
    schema_regex(schema, depth)
    return list(_joined(_of(schema).parts(schema, "", depth)))


def object_regex(depth: int) -> str:
    """The expression of JSON objects that nest to a depth."""
    return str(_object(_any(depth - 1)))


def _of(schema: Any) -> _Translator:
    library = extra("jsonschema", "json_schema")
    try:
        library.Draft202012Validator.check_schema(schema)
    except library.SchemaError as error:
        at = ".".join(map(str, error.absolute_path))
        raise ValueError(f"json_schema is not valid{f' at {at}' if at else ''}: {error.message}") from None
    return _Translator(schema)


def _joined(parts: Iterator[Part]) -> Iterator[Part]:
    """The same with neighbouring texts in one."""
    text = ""
    for part in parts:
        if not part.regex:
            text += part.text
            continue
        if text:
            yield Part(text)
        text = ""
        yield part
    if text:
        yield Part(text)


@dataclass
class _Translator:
    """Translates the parts of one schema.

    Attributes:
        root: the whole schema, to which references point.
        within: how often each reference is being followed.
        parts_made: how many parts were translated so far.
    """

    root: Any
    within: dict[str, int] = field(default_factory=dict)
    parts_made: int = 0

    def value(self, schema: Any, at: str, depth: int) -> str | None:
        """The expression of a schema; None where it has no value."""
        self.parts_made += 1
        found = self._value(schema, at, depth)
        if self.parts_made > _MOST_PARTS or (found is not None and len(found) > _LONGEST):
            raise ValueError("json_schema is too large once its references are followed; use a smaller depth")
        return found

    def _value(self, schema: Any, at: str, depth: int) -> str | None:
        if schema is False:
            return None
        if schema is True:
            return _any(depth)
        if "$id" in schema and schema is not self.root:
            raise _unsupported("$id", at, "below the root")
        if "enum" in schema or "const" in schema:
            return self._listed(schema, at)
        for name in _COMBINED:
            if name in schema:
                _only(schema, {name}, at)
                return self._combined(name, schema[name], at, depth)
        kinds = self._kinds(schema, at)
        if kinds == _TYPES:
            return _any(depth)
        found = [getattr(self, f"_{kind}")(schema, at, depth) for kind in kinds]
        return _either([each for each in found if each is not None])

    def parts(self, schema: Any, at: str, depth: int) -> Iterator[Part]:
        """The scaffold of a schema."""
        if isinstance(schema, Mapping) and "$ref" in schema and not self.within.get(schema["$ref"]):
            name = schema["$ref"]
            self.within[name] = 1
            yield from self.parts(self._resolved(name, at), at, depth)
            self.within[name] = 0
        elif isinstance(schema, Mapping) and schema.get("properties") and self._kinds(schema, at) == ("object",):
            before = "{"
            for name, inner in self._properties(schema, at):
                if inner is False:
                    continue
                yield Part(f"{before}{json.dumps(name, ensure_ascii=False)}: ")
                before = ", "
                yield from self.parts(inner, _below(at, name), depth)
            yield Part("{}" if before == "{" else "}")
        elif isinstance(schema, Mapping) and "const" in schema:
            yield Part(json.dumps(schema["const"], ensure_ascii=False))
        else:
            regex = self.value(schema, at, depth)
            if regex is None:
                raise ValueError(f"json_schema has no value at {at or 'its root'} that ends within depth={depth}")
            yield Part("", regex, at, self._texts(schema))

    def _texts(self, schema: Any) -> tuple[str, ...]:
        if not isinstance(schema, Mapping):
            return ()
        if "enum" in schema:
            return tuple(json.dumps(each, ensure_ascii=False) for each in schema["enum"])
        return {"boolean": ("true", "false"), "null": ("null",)}.get(str(schema.get("type")), ())

    def _kinds(self, schema: Mapping[str, Any], at: str) -> tuple[str, ...]:
        """The types of a schema; those that its keywords are about where it names none."""
        about = [kind for kind, words in _OF_TYPE.items() if words & schema.keys()]
        given = schema.get("type", about or list(_TYPES))
        kinds = tuple([given] if isinstance(given, str) else given)
        allowed = set[str]().union(*(_OF_TYPE.get("number" if kind == "integer" else kind, ()) for kind in kinds))
        _only(schema, allowed | {"type"}, at)
        if "number" in kinds:  # integers are among them
            kinds = tuple(kind for kind in kinds if kind != "integer")
        return kinds

    def _listed(self, schema: Mapping[str, Any], at: str) -> str:
        """The values of `enum` and `const` that all other keywords allow."""
        library = extra("jsonschema", "json_schema")
        for name in ("not", "if", *_COMBINED):
            if name in schema:
                raise _unsupported(name, at, "beside enum or const")
        for name in ("pattern", "patternProperties"):  # Python's expressions may take any time
            if any(_each(schema, name)):
                raise _unsupported(name, at, "beside enum or const", "leave out the values that it forbids")
        _only(schema, {*library.Draft202012Validator.VALIDATORS, *_WITHIN}, at)
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if any(isinstance(each, (str, list, Mapping)) for each in values):  # formats are of strings
            for name in _each(schema, "format"):
                if name not in _OF_NUMBERS:
                    _check_format(name, at)
        formats = library.FormatChecker(())
        for name, regex in _FORMATS.items():
            formats.checks(name)(partial(_matches, re.compile(regex)))
        check = library.Draft202012Validator(schema, format_checker=formats)
        try:
            texts = [json.dumps(each, ensure_ascii=False) for each in values if check.is_valid(each)]
        except Exception:  # noqa: BLE001  # references into the whole schema, which it raises private errors for
            raise _unsupported("$ref", at, "below enum or const") from None
        if not texts:
            raise ValueError(f"json_schema has no value{_at(at)} that its enum, const and other keywords all allow")
        return _either([escaped(text) for text in dict.fromkeys(texts)]) or ""

    def _combined(self, name: str, value: Any, at: str, depth: int) -> str | None:
        if name == "$ref":
            # Each time that it contains itself counts, so that the number of levels is bounded.
            if self.within.get(value, 0) > depth:
                return None
            self.within[value] = self.within.get(value, 0) + 1
            regex = self.value(self._resolved(value, at), at, depth)
            self.within[value] -= 1
            return regex
        if name == "allOf" and len(value) > 1:
            raise _unsupported("allOf", at, "of several schemas", "merge them")
        if name == "oneOf" and not self._disjoint(value, at):
            raise _unsupported("oneOf", at, "of schemas that may overlap", "use anyOf")
        found = [self.value(each, at, depth) for each in value]
        return _either([each for each in found if each is not None])

    def _resolved(self, name: str, at: str) -> Any:
        """What a reference within the schema points to."""
        if not name.startswith("#"):
            raise _unsupported("$ref", at, f"to {name!r}, outside the schema")
        anchor, *steps = unquote(name.removeprefix("#")).split("/")
        if anchor:
            raise _unsupported("$ref", at, f"to the anchor {name!r}", "write where it is, such as '#/$defs/name'")
        found = self.root
        for step in steps:
            key = step.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, ValueError, IndexError, TypeError):
                raise ValueError(f"json_schema has no {name!r}, which $ref{_at(at)} points to; correct it") from None
            if isinstance(found, Mapping) and isinstance(found.get("$id"), str):
                raise _unsupported("$id", at, f"within {name!r}")
        return found

    def _disjoint(self, schemas: list[Any], at: str) -> bool:
        """Whether no value is of two of these schemas, by their types or by a property with different constants."""
        followed = []
        for each in schemas:
            for _ in range(8):
                if isinstance(each, Mapping) and "$ref" in each:
                    each = self._resolved(each["$ref"], at)
            followed.append(each)
        if len(followed) < 2:
            return True
        if not all(isinstance(each, Mapping) and not set(_COMBINED) & set(each) for each in followed):
            return False
        written = [set(_TYPES) if {"enum", "const"} & set(each) else set(self._kinds(each, at)) for each in followed]
        written = [each | ({"integer"} if "number" in each else set()) for each in written]
        # Without a type, values of all types are valid that its keywords are not about.
        valid = [kinds if "type" in each else set(_TYPES) for each, kinds in zip(followed, written, strict=True)]
        pairs = permutations(zip(written, valid, strict=True), 2)
        both = set[str]().union(*(one[0] & other[1] for one, other in pairs))
        shared = set.intersection(*(set(each.get("required", ())) for each in followed))
        return not both or (
            both == {"object"}
            and any(_apart([each.get("properties", {}).get(name) for each in followed]) for name in shared)
        )

    def _boolean(self, schema: Mapping[str, Any], at: str, depth: int) -> str:
        return "(?:true|false)"

    def _null(self, schema: Mapping[str, Any], at: str, depth: int) -> str:
        return "null"

    def _integer(self, schema: Mapping[str, Any], at: str, depth: int) -> str:
        return integers(schema, _at(at))

    def _number(self, schema: Mapping[str, Any], at: str, depth: int) -> str:
        return numbers(schema, _at(at)) if _OF_TYPE["number"] & schema.keys() else _NUMBER

    def _string(self, schema: Mapping[str, Any], at: str, depth: int) -> str | None:
        low, high = _bounds(schema, "Length")
        others = [name for name in ("pattern", "format") if name in schema]
        if len(others) > 1 or (others and (low or high is not None)):
            raise _unsupported(others[0], at, "beside another bound of a string")
        if others == ["format"]:
            _check_format(schema["format"], at)
            return f'"{_FORMATS[schema["format"]]}"'
        if others == ["pattern"]:
            return f'"{_pattern(schema["pattern"], at)}"'
        return _bounded(f'"{_LETTER}', low, high, '"')

    def _array(self, schema: Mapping[str, Any], at: str, depth: int) -> str | None:
        low, high = _bounds(schema, "Items")
        if schema.get("uniqueItems") and (high is None or high > 1):
            raise _unsupported("uniqueItems", at, "of several items")
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        if high is not None and high < low:
            return None
        if first:
            most = len(first) if high is None else high
            if ("items" in schema and rest is not False) or low > len(first) or most < len(first):
                raise _unsupported("prefixItems", at, "beside items or a number of items")
            found = [self.value(each, _below(at, str(place)), depth - 1) for place, each in enumerate(first)]
            inner = f"{_SPACE},{_SPACE}".join(f"(?:{each})" for each in found)
            return None if None in found else f"\\[{_SPACE}{inner}{_SPACE}\\]"
        item = self.value(rest, _below(at, "items"), depth - 1) if depth > 0 or rest is not True else None
        return _list("\\[", item, low, high, "\\]")

    def _object(self, schema: Mapping[str, Any], at: str, depth: int) -> str | None:
        properties = self._properties(schema, at)
        low, high = _bounds(schema, "Properties")
        required = set(schema.get("required", ()))
        if not properties:
            others = schema.get("additionalProperties", True)
            if low > 1:  # a name that is written twice counts once
                raise _unsupported("minProperties", at, "of names that are not declared")
            value = (
                self.value(others, _below(at, "additionalProperties"), depth - 1)
                if depth > 0 or others is not True
                else None
            )
            return _object(value, low, high)
        if low > len(required):
            raise _unsupported("minProperties", at, "above the number of required properties")
        if high is not None and high < len(properties):
            raise _unsupported("maxProperties", at, "below the number of properties")
        found = []
        for name, inner in properties:
            value = self.value(inner, _below(at, name), depth)
            if value is None and name in required:
                return None
            if value is not None:
                text = escaped(json.dumps(name, ensure_ascii=False))
                found.append((f"{text}{_SPACE}:{_SPACE}(?:{value})", name in required))
        return f"\\{{{_SPACE}{_in_order(found)}\\}}"

    def _properties(self, schema: Mapping[str, Any], at: str) -> list[tuple[str, Any]]:
        """The declared properties, and those that are required without being declared."""
        found, others = dict(schema.get("properties", {})), schema.get("additionalProperties", True)
        for name in schema.get("required", ()):
            if name not in found:
                if others is False:
                    raise ValueError(
                        f"json_schema requires {name!r}{_at(at)}, which additionalProperties forbids; declare it"
                    )
                found[name] = others
        return list(found.items())


def _in_order(properties: list[tuple[str, bool]]) -> str:
    """Properties with commas between them, where those that are not required may be left out."""
    more = [""]  # what may follow after the n-th last property, if there was one
    for text, required in reversed(properties):
        following = f"{_SPACE},{_SPACE}{text}"
        more.append((following if required else f"(?:{following})?") + more[-1])
    result = ""
    for number, (text, required) in reversed(list(enumerate(properties))):
        begun = f"{text}{more[len(properties) - number - 1]}{_SPACE}"
        result = begun if required else f"(?:{begun}|{result})"
    return result


def _either(options: list[str]) -> str | None:
    return None if not options else options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


def _bounds(schema: Mapping[str, Any], what: str) -> tuple[int, int | None]:
    """The least and the largest number of something; JSON may write them as 3.0."""
    most = schema.get(f"max{what}")
    return int(schema.get(f"min{what}", 0)), None if most is None else int(most)


def _bounded(part: str, low: int, high: int | None, end: str) -> str | None:
    if high is not None and high < low:
        return None
    return f"{part}{{{low},{'' if high is None else high}}}{end}"


def _list(begin: str, item: str | None, low: int, high: int | None, end: str) -> str | None:
    """Items with commas between them; without a value for them, none."""
    if item is None or high == 0:
        return None if low else f"{begin}{_SPACE}{end}"
    following = f"(?:{_SPACE},{_SPACE}(?:{item})){{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
    inner = f"(?:{item}){following}{_SPACE}"
    return f"{begin}{_SPACE}{inner if low else f'(?:{inner})?'}{end}"


def _object(value: str | None, low: int = 0, high: int | None = None) -> str | None:
    pair = None if value is None else f"{STRING}{_SPACE}:{_SPACE}(?:{value})"
    return _list("\\{", pair, low, high, "\\}")


def _scalar() -> str:
    return f"(?:{STRING}|{_NUMBER}|true|false|null)"


def _any(depth: int) -> str:
    """Any value whose arrays and objects nest to a depth."""
    found = _scalar()
    for _ in range(depth):
        found = f"(?:{_scalar()}|{_list(chr(92) + '[', found, 0, None, chr(92) + ']')}|{_object(found)})"
    return found


def _pattern(pattern: str, at: str) -> str:
    """A pattern whose texts need no escapes in a string, to be matched as a whole."""
    try:
        regex = without_anchors(translated(pattern, _DIALECT))
    except ValueError as error:
        raise ValueError(f"json_schema has pattern={pattern!r}{_at(at)}: {error}") from None
    automaton = compile_regex(regex, f"pattern={pattern!r}{_at(at)}")
    if automaton.follow[:, [*range(32), ord('"'), ord("\\"), 127]].any():
        raise _unsupported(
            "pattern", at, f"{pattern!r} that matches quotes, backslashes or control characters", "exclude them"
        )
    return f"(?:{regex})"


def _each(value: Any, name: str, named: bool = False) -> Iterator[Any]:
    """The values of a keyword in a schema and in those within it.

    Args:
        value: the schema, or a list or a mapping of schemas.
        name: the keyword.
        named: whether it is a mapping of schemas by name.
    """
    if isinstance(value, Mapping):
        if name in value and not named:
            yield value[name]
        for word, inner in value.items():
            if named or word not in _VALUES:
                yield from _each(inner, name, not named and word in _BY_NAME)
    elif isinstance(value, list):
        for each in value:
            yield from _each(each, name)


def _check_format(name: str, at: str) -> None:
    if name not in _FORMATS:
        raise _unsupported("format", at, repr(name), f"use one of {', '.join(_FORMATS)}")


def _matches(regex: re.Pattern[str], value: Any) -> bool:
    return not isinstance(value, str) or regex.fullmatch(value) is not None


def _apart(schemas: list[Any]) -> bool:
    """Whether these all list their values, and no value is in two lists."""
    if not all(isinstance(each, Mapping) and {"enum", "const"} & set(each) for each in schemas):
        return False
    values = [_canonical(value) for each in schemas for value in each.get("enum", [each.get("const")])]
    return len(values) == len(set(values))


def _canonical(value: Any) -> str:
    """The same text for values that are equal in JSON: 1 and 1.0, and objects in any order."""
    if isinstance(value, Mapping):
        return f"{{{','.join(sorted(f'{json.dumps(name)}:{_canonical(each)}' for name, each in value.items()))}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_canonical, value))}]"
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _only(schema: Mapping[str, Any], allowed: set[str] | frozenset[str], at: str) -> None:
    """Reject (ValueError) other keywords."""
    for name in schema:
        if name not in allowed and name not in _NOTES:
            beside = (
                "beside $ref, anyOf, oneOf or allOf" if set(_COMBINED) & set(schema) and name not in _COMBINED else ""
            )
            raise _unsupported(name, at, beside)


def _unsupported(name: str, at: str, how: str = "", fix: str = "leave it out") -> ValueError:
    return ValueError(f"json_schema has {name!r}{_at(at)}{f' {how}' if how else ''}, which is not supported; {fix}")


def _at(at: str) -> str:
    return f" at {at}" if at else ""


def _below(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name
