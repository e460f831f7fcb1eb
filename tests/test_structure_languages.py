"""Formats as automata: what partly masked rows may take, which texts match, and what is rejected."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

import dllm
from dllm.structure import MASK, Constraint, Tracker, read_format
from structure_rig import SUMS, compiled_here, text_model, text_tokenizer

jsonschema = pytest.importorskip("jsonschema")
lark = pytest.importorskip("lark")
pytest.importorskip("outlines_core")
from dllm.structure import compiled, language  # noqa: E402
from dllm.structure.language import Automaton, compile_regex, minimal  # noqa: E402
from dllm.structure.tokens import END, TokenAutomaton, lift, token_bytes  # noqa: E402

REPLACE = decoders.Replace("\u2581", " ")
LLAMA = decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])

# The first one ends the text, and two are parts of a character.
WORDS = [None, b"a", b"b", b"ab", b"ba", b"aab", b"c", b"\xc3", b"\xa9", "é".encode()]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats are compiled in this process."""
    monkeypatch.setattr(compiled, "_written", compiled_here)


def is_text(automaton: Automaton, row: tuple[int, ...]) -> bool:
    """Whether tokens are a word, followed by nothing but end-of-text."""
    end = next((place for place, token in enumerate(row) if token == 0), len(row))
    return not any(row[end:]) and automaton.accepts(b"".join(WORDS[token] or b"" for token in row[:end]))


def completions(automaton: Automaton, row: list[int], free: int | None = None) -> set[tuple[int, ...]]:
    """All texts that a row with masks may become; one of its positions may be free."""
    options = [range(len(WORDS)) if token < 0 or place == free else [token] for place, token in enumerate(row)]
    return {each for each in itertools.product(*options) if is_text(automaton, each)}


def lifted(regex: str) -> tuple[Automaton, TokenAutomaton, np.ndarray]:
    automaton = compile_regex(regex, "regex")
    tokens = lift(automaton, WORDS, WORDS, "regex")
    return automaton, tokens, np.where(np.arange(len(WORDS)) == 0, END, tokens.classes)


@pytest.mark.parametrize("regex", ["a*b", "(ab|ba)*", "a{2,3}b?", "é*", "[ab]é|c+", "(a|b)*abb", "a|ab|aab", ""])
def test_allowed_tokens_are_those_of_some_completion(regex: str) -> None:
    automaton, tokens, classes = lifted(regex)
    source = random.Random(regex)
    for length in (1, 2, 3, 4):
        tracker, row = Tracker(tokens, length), [-1] * length
        assert (tokens.distance[tokens.start] <= length) == bool(completions(automaton, row))
        for _ in range(10 if completions(automaton, row) else 0):
            allowed = []
            for place in range(length):
                allowed.append({each[place] for each in completions(automaton, row, free=place)})
                assert set(np.flatnonzero(tracker.allowed(place)[classes])) == allowed[-1]
            place = source.randrange(length)
            row[place] = -1 if source.random() < 0.3 else source.choice(sorted(allowed[place]))
            tracker.read(np.where(np.array(row) < 0, MASK, classes[row]))
            assert tracker.satisfiable


@pytest.mark.parametrize("regex", ["(ab|ba)*", "[ab]é|c+", "(a|b)*abb"])
def test_changes_are_accepted_in_order_while_a_completion_is_left(regex: str) -> None:
    automaton, tokens, classes = lifted(regex)
    source = random.Random(regex)
    for _ in range(60):
        length = source.randrange(2, 5)
        row = [-1] * length
        known = sorted(completions(automaton, row))
        if not known:
            continue
        full = source.choice(known)
        row = [token if source.random() < 0.4 else -1 for token in full]
        tracker = Tracker(tokens, length)
        tracker.read(np.where(np.array(row) < 0, MASK, classes[row]))
        places = source.sample(range(length), source.randrange(1, length + 1))
        wanted = [source.randrange(len(WORDS)) for _ in places]
        accepted = tracker.accepted(np.array(places), classes[wanted])
        if all(accepted):
            now = row.copy()
            for place, token in zip(places, wanted, strict=True):
                now[place] = token
            assert completions(automaton, now)
            continue
        for place, token, taken in zip(places, wanted, accepted, strict=True):
            before, row[place] = row[place], token
            assert bool(completions(automaton, row)) == taken
            row[place] = row[place] if taken else before


def test_sets_that_follow_changes_equal_those_computed_again() -> None:
    _, tokens, classes = lifted("(a|b)*abb(ab|c)*é?")
    source, length = random.Random(0), 12
    tracker, row = Tracker(tokens, length), np.full(length, MASK)
    for _ in range(80):
        fresh = Tracker(tokens, length)
        fresh.read(row)
        place = source.randrange(length)
        assert (fresh.allowed(place) == tracker.allowed(place)).all()
        fits = np.flatnonzero(tracker.allowed(place)[classes])
        row[place] = MASK if source.random() < 0.4 else classes[source.choice(fits.tolist())]
        assert (tracker.fork(row).allowed(place) == tracker.allowed(place)).all()
        tracker.read(row)


SCHEMAS: list[tuple[Any, list[Any], list[str]]] = [
    ({"type": "integer", "minimum": -17, "maximum": 123}, [-17, -3, 0, 9, 99, 123], ["-18", "124", "00", "1.0"]),
    ({"type": "integer", "exclusiveMinimum": 99}, [100, 1000, 12345], ["99", "0", "-100"]),
    ({"type": "integer", "exclusiveMaximum": -9}, [-10, -99], ["-9", "0", "10"]),
    ({"type": "integer", "minimum": 0, "maximum": 20, "multipleOf": 5}, [0, 15, 20], ["1", "25"]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 2}, [0.5, 1, 1.25, 2], ["0", "0.0", "2.1", "-1"]),
    ({"type": "number", "minimum": -3}, [-3, -2.5, 0, 7.25], ["-3.1", "-4"]),
    ({"type": "number", "minimum": -(2**63), "maximum": 2**63 - 1}, [0.5, -1.5, 2**63 - 1, -(2**63), 2**53 + 1],
     ["9223372036854775806.5", "9223372036854775808", "-9223372036854775808.5"]),
    ({"type": "number", "minimum": 2**53 + 1}, [2**53 + 1, 2**60 + 1], ["9007199254740993.0", "9007199254740992"]),
    ({"minimum": 3}, [3, 3.5], ["2", '"a"']),
    ({"type": "string", "minLength": 1.0, "maxLength": 2.0}, ["a", "é😀"], ['""', '"abc"', '"\n"']),
    ({"type": "string", "pattern": "^(a|b)\\d.$"}, ["a1x", "b9é"], ['"c1x"', '"a1""', '"a1\\"']),
    ({"type": "string", "format": "date"}, ["2020-02-28", "1999-12-31"], ['"2023-02-29"', '"2024-13-01"']),
    ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ['"123"']),
    ({"type": ["string", "null"]}, ["", None], ["1"]),
    ({"enum": ["é\n", 1, {"a": [1, 2]}], "type": ["string", "object"]}, ["é\n", {"a": [1, 2]}], ["1"]),
    ({"enum": ["2020-01-01", "tomorrow", 3], "format": "date"}, ["2020-01-01", 3], ['"tomorrow"']),
    ({"type": "integer", "format": "int32", "enum": [1, 2]}, [1, 2], ["3"]),
    ({"enum": [1, "a"], "format": "int32", "default": {"format": "x"}, "examples": [{"format": "x"}]}, [1, "a"], ["2"]),
    ({"enum": [[1, 2], [1, 1]], "contains": {"const": 1}, "minContains": 1, "maxContains": 1}, [[1, 2]], ["[1, 1]"]),
    ({"enum": [{"a": "x"}, {"a": "1.2.3.4"}], "properties": {"a": {"format": "ipv4"}}},
     [{"a": "1.2.3.4"}], ['{"a": "x"}']),
    ({"const": {"format": 1}, "properties": {"format": {"type": "integer"}}}, [{"format": 1}], ["1"]),
    ({"const": 'a"b'}, ['a"b'], ['"a"']),
    ({"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}}]}, [True, [], [None]], ["[1]"]),
    ({"oneOf": [{"type": "boolean"}, {"type": "number"}]}, [True, 1.5], ["null"]),
    (
        {
            "oneOf": [
                {"type": "object", "properties": {"k": {"const": "a"}, "v": {"type": "null"}}, "required": ["k", "v"]},
                {"type": "object", "properties": {"k": {"const": "b"}, "w": {"type": "null"}}, "required": ["k"]},
            ]
        },
        [{"k": "a", "v": None}, {"k": "b"}, {"k": "b", "w": None}],
        ['{"k": "a"}', '{"k": "a", "w": null}'],
    ),
    ({"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], ["[]", "[1, 1, 1]"]),
    ({"type": "array", "prefixItems": [{"type": "null"}, {"enum": [1]}], "items": False}, [[None, 1]], ["[null]"]),
    ({"type": "array", "uniqueItems": True, "maxItems": 1, "items": {"type": "null"}}, [[], [None]], ["[null,null]"]),
    (
        {"properties": {"a": {"type": "null"}, 'q"': {"type": "null"}, "c": {"type": "null"}}, "required": ['q"']},
        [{'q"': None}, {"a": None, 'q"': None}, {'q"': None, "c": None}],
        ["{}", '{"a": null}', '{"q\\"": null,}', '{, "q\\"": null}', '{"q\\"": null, "z": null}'],
    ),
    ({"type": "object", "properties": {"a": {"type": "null"}}}, [{}, {"a": None}], ['{"a": 1}']),
    ({"type": "object", "required": ["z"]}, [{"z": 1}, {"z": {"a": [None]}}], ["{}"]),
    ({"additionalProperties": {"type": "null"}, "maxProperties": 2}, [{}, {"x": None, "y": None}], ['{"x": 1}']),
    ({"type": "object", "properties": {}, "additionalProperties": False}, [{}], ['{"a": 1}']),
    (
        {"$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
        [{}, {"c": {"c": {}}}],
        ['{"c": 1}'],
    ),
    (True, [1, "a", [{}, [1.5]], {"a": {"b": [None]}}], ["[", "nul"]),
    ({"allOf": [{"type": "null"}], "title": "x", "description": "y"}, [None], ["1"]),
    (
        {"$ref": "#/$defs/my%20a%25b", "$defs": {"my a%b": {"type": "null"}, "my a%25b": {"type": "boolean"}}},
        [None],
        ["true"],
    ),
    ({"type": "array", "prefixItems": [{"type": "null"}], "minItems": 1, "maxItems": 1}, [[None]], ["[]"]),
    ({"type": "string", "pattern": "^[^!--]\\S$"}, ["aé", ".a"], ['"%a"', '"a\u00a0"', '"a\ufeff"', '".\u2028"']),
    ({"type": "string", "pattern": "^[[a]]$"}, ["[]", "a]"], ['"a"']),
    ({"type": "string", "pattern": "^a{1, 2}.$"}, ["a{1, 2}b"], ['"aab"', '"a{1, 2}\u2028"']),
    ({"type": "string", "pattern": "^[a&&b~~-][^\\s~]$"}, ["&a", "~-"], ['"&~"', '"&\u00a0"', '"c "']),
]  # fmt: skip


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("schema", "right", "wrong"), SCHEMAS)
def test_texts_of_a_schema_are_valid_under_it(schema: Any, right: list[Any], wrong: list[str]) -> None:
    form = read_format({"type": "json_schema", "schema": schema})
    assert form is not None
    automaton = form.compiled.automaton
    check = jsonschema.Draft202012Validator(schema)
    for value in right:
        check.validate(value)
        assert automaton.accepts(json.dumps(value, ensure_ascii=False).encode()), value
    assert not any(automaton.accepts(text.encode()) for text in wrong)
    for text in sampled(automaton, 40):
        check.validate(json.loads(text))


def sampled(automaton: Automaton, count: int) -> list[str]:
    """Random words."""
    source = random.Random(0)
    near = np.where(automaton.accepting, 0, 10**6)
    live = automaton.follow > 0
    for _ in range(400):
        near = np.minimum(near, 1 + np.where(live, near[automaton.follow], 10**6).min(1))
    found = []
    for _ in range(count):
        state, word, steps = automaton.start, b"", source.randrange(60)
        while True:
            options = np.flatnonzero(automaton.follow[state])
            if len(word) >= steps:  # the shortest way to an end
                if automaton.accepting[state]:
                    break
                options = options[near[automaton.follow[state, options]] == near[state] - 1]
            elif not options.size:
                break
            byte = int(source.choice(options.tolist()))
            state, word = int(automaton.follow[state, byte]), word + bytes([byte])
        found.append(word.decode())
    return found


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "patternProperties": {"a": {}}}, "'patternProperties'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' of several items"),
        ({"type": "array", "contains": {}}, "'contains'"),
        ({"properties": {"a": {"not": {}}}}, "'not' at a"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"type": "number", "minimum": 0.5}, "'minimum' of a number"),
        ({"type": "integer", "multipleOf": 3}, "'multipleOf'"),
        ({"type": "string", "format": "uri"}, "'format' 'uri'"),
        ({"type": "string", "pattern": 'a"'}, "'pattern'"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "'pattern' beside another bound"),
        ({"allOf": [{"type": "null"}, {"title": "x"}]}, "'allOf' of several schemas"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf' of schemas that may overlap"),
        # Without a type, values of other types are valid.
        ({"oneOf": [{"type": "integer"}, {"maxLength": 4}]}, "'oneOf' of schemas that may overlap"),
        ({"oneOf": [{"type": "null"}, {"properties": {"a": {}}, "required": ["a"]}]}, "'oneOf' of schemas that may"),
        ({"oneOf": [{"type": "string"}, {"minimum": 5}]}, "'oneOf' of schemas that may overlap"),
        ({"anyOf": [{"type": "integer"}], "minimum": 3}, "'minimum' beside"),
        ({"$ref": "http://x/y"}, "'$ref' to 'http://x/y'"),
        ({"$ref": "#/nope"}, "has no '#/nope'"),
        ({"$ref": "#"}, "no value that ends within depth=3"),
        ({"type": "string", "minimum": 3}, "'minimum'"),
        ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "'minProperties'"),
        ({"typ": "string"}, "'typ'"),
        ({"type": "foo"}, "not valid at type"),
        ({"enum": [1], "type": "string"}, "no value"),
        ({"enum": [1], "foo": 3}, "'foo'"),
        ({"const": "a", "contentEncoding": "base64"}, "'contentEncoding'"),
        ({"enum": ["a"], "format": "uri"}, "'format' 'uri'"),
        ({"const": {"a": "b"}, "properties": {"a": {"format": "uri"}}}, "'format' 'uri'"),
        ({"enum": [{"a": 1}], "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {}}, "'$ref' below enum"),
        ({"enum": [1], "anyOf": [{"type": "integer"}]}, "'anyOf' beside enum"),
        ({"$ref": "#foo", "$defs": {"x": {"$anchor": "foo", "type": "integer"}}}, "'$ref' to the anchor '#foo'"),
        ({"anyOf": [{"$id": "http://x/y", "type": "null"}]}, "'$id' below the root"),
        ({"$ref": "#/$defs/x/$defs/n", "$defs": {"x": {"$id": "y", "$defs": {"n": {}}}}}, "'$id' within"),
        ({"type": "array", "prefixItems": [{"type": "null"}], "maxItems": 0}, "'prefixItems' beside"),
        ({"oneOf": [{"type": "object", "required": ["k"], "properties": {"k": {"const": each}}} for each in (1, 1.0)]},
         "'oneOf' of schemas that may overlap"),
        ({"oneOf": [{"type": "object", "required": ["k"], "properties": {"k": {"const": each}}}
                    for each in ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1})]}, "'oneOf' of schemas that may overlap"),
        ({"type": "number", "exclusiveMinimum": 99999999999}, "'exclusiveMinimum' of a number, which is supported up"),
        ({"type": "string", "pattern": "a*+"}, ": '+' after another count"),
        ({"type": "string", "pattern": "a{,3}"}, ": '{,' is read in several ways"),
        ({"type": "string", "pattern": "[\\s\\S]"}, ": '\\S' within a class"),
        ({"type": "string", "pattern": "[]a]"}, ": a class that begins with ']'"),
        ({"type": "string", "pattern": "[+-\\d]"}, "is not valid at pattern"),
        ({"type": "string", "pattern": "[a"}, "is not valid at pattern"),
        ({"type": "string", "pattern": "\\x{41}"}, "is not valid at pattern"),
        ({"type": "string", "pattern": "a\\"}, "is not valid at pattern"),
    ],
)  # fmt: skip
def test_keywords_that_cannot_be_expressed_are_rejected_by_name(schema: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"^response_format: json_schema .*{re.escape(named)}"):
        read_format({"type": "json_schema", "schema": schema})


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_texts_of_a_grammar_parse(depth: int) -> None:
    parser = lark.Lark(SUMS)
    form = read_format({"type": "grammar", "grammar": SUMS, "depth": depth})
    assert form is not None
    automaton = form.compiled.automaton
    for text in sampled(automaton, 40):
        parser.parse(text)
    for level in range(4):
        assert automaton.accepts(("(" * level + "12 + 3*4" + ")" * level).encode()) == (level <= depth)
    assert automaton.accepts(b"1" + b"+2*3" * 20)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        ('start: "a" start "b" | "c"', ["c", "acb", "aacbb"], ["acbb", "ab"]),
        ('start: "a" start | "c"', ["c", "aaaaaaaac"], ["a"]),
        ('start: (STR ",")* STR\n%import common.ESCAPED_STRING -> STR', ['"a"', '"a\\"b","c"'], ['"a', '"a"b"']),
        ('start: "x"i [ "y" ] ("z")~2..3', ["Xzz", "xyzzz"], ["xz", "xYzz"]),
        ("start: C\n%import common.C_COMMENT -> C", ["/**/", "/* a\n **/"], ["/**/*/", "/* a"]),
        ("start: /[0-9]+\\.[0-9]+|[0-9]+/", ["1", "1.25"], ["1."]),
        ("start: /[a-z]+?;/", ["ab;"], ["ab;c;"]),
    ],
)
def test_repetition_of_rules(grammar: str, right: list[str], wrong: list[str]) -> None:
    form = read_format({"type": "grammar", "grammar": grammar})
    assert form is not None
    automaton = form.compiled.automaton
    assert all(automaton.accepts(text.encode()) for text in right)
    assert not any(automaton.accepts(text.encode()) for text in wrong)
    for text in right:
        lark.Lark(grammar).parse(text)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("pattern", "taken", "word"),
    [
        ('".*?"', '""', '"""'),
        ("[a-z]+?", "a", "aa"),
        ("<!--.*?-->", "<!---->", "<!---->-->"),
        ("[1-9]|[1-9][0-9]", "1", "10"),
        ("(x|xy)z?", "x", "xy"),
        ("x[0-9]*([0-9]\\.[0-9])?", "x0", "x0.0"),
        ("xa?(ab)?", "xa", "xab"),
        ("café|cafés", "café", "cafés"),
        ("([ab]c?){12}(d|de)", "aaaaaaaaaaaad", "aaaaaaaaaaaade"),
        ("b(|a)*", "b", "ba"),
    ],
)
def test_a_terminal_that_lark_takes_the_first_match_of_is_refused(pattern: str, taken: str, word: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Lark takes {taken!r} where {word!r} stands; put longer")):
        read_format({"type": "grammar", "grammar": f'start: "-" N\nN: /{pattern}/'})
    with pytest.raises(lark.exceptions.LarkError):
        lark.Lark(f"start: /{pattern}/", lexer="dynamic_complete").parse(word)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "pattern",
    [
        "[a-z ]*[a-z]",
        "([a-z]+|foo)(-x)?",
        "\\d*\\.?\\d+",
        "(a|aa)*b",
        "(a|ab)(c|bcd)?e",
        "x??y",
        "\\w{1,9}(é|è)?",
        "b(a|)+",
    ],
)
def test_a_terminal_that_lark_takes_whole_is_not_refused(pattern: str) -> None:
    form = read_format({"type": "grammar", "grammar": f'start: "-" N\nN: /{pattern}/'})
    assert form is not None
    for text in sampled(form.compiled.automaton, 20):
        match = re.match(f"-{pattern}", text)
        assert match is not None and match[0] == text


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        ('start: INT ("+" INT)+\nINT: /[0-9]/\n%ignore /#[^\\n]*/', ["1+2", "1+2# sum"], ["1#+2", "#1+2"]),
        ('start: INT (" + " INT)+\nINT: /[0-9]/\n%ignore /\\s+/', ["1 + 2", " 1 +  2 "], ["1  + 2"]),
        ('start: "a" "\\n" "b"\n%ignore /#.*/\n%ignore " "', ["a\nb", "a# b\n b", "a\nb#"], ["a# b\n #b"]),
        ('start: "い" /[あ-ん]/\n%ignore /\\s+/', ["い あ", "\u3000いん"], []),
        ('start: "a" "-" "->"\n%ignore /-+!/', ["a-!-->", "a-->"], ["a-"]),
        ('start: "-a"\n%ignore /x(-a)*/', ["-a", "-ax-a"], ["x-a"]),
    ],
)
def test_what_is_ignored_is_ignored_as_far_as_lark_does(grammar: str, right: list[str], wrong: list[str]) -> None:
    form, parser = read_format({"type": "grammar", "grammar": grammar}), lark.Lark(grammar, lexer="dynamic_complete")
    assert form is not None
    automaton = form.compiled.automaton
    assert all(automaton.accepts(text.encode()) for text in right)
    for text in [*right, *sampled(automaton, 20)]:
        parser.parse(text)
    for text in wrong:
        assert not automaton.accepts(text.encode())
        with pytest.raises(lark.exceptions.LarkError):
            parser.parse(text)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "pattern", ["[^i]", "[^\\u0131]", "[^a-z]", "i", "ß", "[k-s]", "\\u0130", "[\\W_]", "(?-i:[^i])i?", "(?s:.)"]
)
def test_case_is_folded_as_python_does(pattern: str) -> None:
    letters = "aAiI\u0131İkK\u212asS\u017fßẞ_é\n"
    grammar = read_format({"type": "grammar", "grammar": f"start: /{pattern}/i"})
    assert grammar is not None
    for letter in letters:
        assert grammar.compiled.automaton.accepts(letter.encode()) == bool(re.fullmatch(f"(?i:{pattern})", letter)), (
            letter
        )


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("pattern", ["(?i)[^i]", "(?i)[^a-z]", "(?i:[k-s])"])
def test_a_pattern_holds_nothing_that_folding_forbids(pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    form, check = read_format({"type": "json_schema", "schema": schema}), jsonschema.Draft202012Validator(schema)
    assert form is not None
    for letter in "aAiI\u0131İkK\u212asS\u017fßẞ_é":
        assert form.compiled.automaton.accepts(f'"{letter}"'.encode()) <= check.is_valid(letter), letter


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("seed", range(4))
def test_texts_of_random_expressions_match_in_python(seed: int) -> None:
    source, compared = random.Random(seed), 0
    pieces = [
        *"ab1-_[]^&~.!+*?{}()|,:#@ é", "\\w", "\\W", "\\d", "\\D", "\\s", "\\S", "\\[", "\\]", "\\-", "\\<", "\\>",
        "\\.", "\\t", "[^a]", "[\\w-]", "[^\\w]", "[\\W]", "[a&&b]", "[!--]", "[^!--]", "[[a]]",
        "[]a]", "[^]a]", "{2}", "{1,3}", "\\x41", "[~~a]", "(?:a|b)",
        "(?i:k)", "[\\s\\S]", "[^\\S]", "[^\\W]", "[a\\-z]", "[+--]", "\\x{41}", "{,2}", "*+", "{1, 3}", "{ 2}",
    ]  # fmt: skip
    while compared < 12:
        pattern = "".join(source.choice(pieces) for _ in range(source.randrange(1, 5)))
        try:
            matched = re.compile(pattern)
            parser = lark.Lark(f"start: /{pattern}/", lexer="dynamic_complete")
            form = read_format({"type": "grammar", "grammar": f"start: /{pattern}/"})
        except (re.error, lark.exceptions.LarkError, ValueError):
            continue
        assert form is not None
        for text in sampled(form.compiled.automaton, 10):
            assert matched.fullmatch(text), (pattern, text)
            parser.parse(text)
        compared += 1


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("given", "named"),
    [
        (3, "response_format=3 is of the wrong type"),
        ({}, "response_format has no type"),
        ({"type": "foo"}, "unknown response_format.type='foo'"),
        ({"type": "regex"}, "response_format of type regex has no regex"),
        ({"type": "regex", "regex": 3}, "response_format.regex=3"),
        ({"type": "regex", "regex": "a)|(b"}, "has a '\\)' without"),
        ({"type": "regex", "regex": "^a|b$"}, "anchors beside alternatives"),
        ({"type": "regex", "regex": "(^a|b)c"}, "has '\\^' within"),
        ({"type": "regex", "regex": r"a(b|c\Z)"}, "Z' within"),
        ({"type": "json_schema", "schema": {"type": "string", "pattern": "(^a|b)c"}}, "has '\\^' within"),
        ({"type": "regex", "regex": "a", "depth": 3}, "unknown option 'response_format.depth'"),
        ({"type": "choice", "choice": []}, "response_format.choice=\\[\\]"),
        ({"type": "choice", "choice": "ab"}, "response_format.choice='ab'"),
        ({"type": "choice", "choice": ["a", "a\0b"]}, r"choice='a\\x00b' has a null character"),
        ({"type": "json_schema", "schema": {"enum": ["\ud800"]}}, "schema has text that is not valid UTF-8"),
        ({"type": "json_schema", "schema": {"properties": {"\ud800": {}}}}, "schema has text that is not valid UTF-8"),
        ({"type": "json_schema"}, "needs json_schema or schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema has no schema"),
        ({"type": "json_schema", "schema": {}, "value_length": 3}, "response_format.value_length has no effect"),
        ({"type": "json_schema", "schema": {}, "scaffold": "x"}, "unknown response_format.scaffold"),
        ({"type": "json_object", "depth": 0}, "response_format.depth=0"),
        ({"type": "grammar", "grammar": "x"}, "response_format: grammar is not valid"),
        ({"type": "grammar", "grammar": 'start: "a" start'}, "no text that ends"),
        (
            {"type": "grammar", "grammar": "%import .tests.lines.A\nstart: A"},
            "imports '.tests.lines', which is not one",
        ),
        ({"type": "grammar", "grammar": "%import lines (A, B)\nstart: A"}, "imports 'lines', which is not one"),
        ({"type": "grammar", "grammar": "start: /[a-z/"}, "unterminated character set"),
        ({"type": "grammar", "grammar": "start: /a{2}{3}/"}, "multiple repeat"),
        ({"type": "grammar", "grammar": "start: /a b/x"}, "has the flag x"),
        ({"type": "grammar", "grammar": "start: /(^a|ab)c?/"}, "'\\^' depends on what is beside it"),
        (
            {"type": "grammar", "grammar": "start: /(?=a)a/"},
            "'\\(\\?=' is not supported, as automata have no lookaround",
        ),
        ({"type": "grammar", "grammar": "start: /a*+b/"}, "cannot be expressed: '\\+' after another count"),
        ("/nope.json", "response_format='/nope.json' cannot be read"),
        ("{", "is not JSON"),
    ],
)
def test_bad_formats_are_rejected_in_one_line(given: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named) as told:
        dllm.Options(response_format=given)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("regex", ["(", "[", "(?=a)b", "(a)\\1", "a\\bb", "a$b"])
def test_expressions_that_are_no_automata_are_rejected_in_one_line(regex: str) -> None:
    with pytest.raises(ValueError, match=r"response_format(\.regex='a\$b'| of type regex)") as told:
        dllm.generate(text_model(), "a", response_format={"type": "regex", "regex": regex}, gen_length=8)
    assert "\n" not in str(told.value)


def test_formats_are_read_from_files(tmp_path: Path) -> None:
    form = {"type": "choice", "choice": ["yes"]}
    (tmp_path / "f.json").write_text(json.dumps(form))
    for given in (form, tmp_path / "f.json", str(tmp_path / "f.json"), json.dumps(form)):
        read = read_format(given)
        assert read is not None
        assert read.body == ["yes"]
    assert read_format(None) is read_format({"type": "text"}) is None


def test_a_format_is_built_once_for_a_tokenizer() -> None:
    words, given = text_tokenizer(), {"type": "regex", "regex": "ab+"}
    first, again = (read_format(dict(given)) for _ in range(2))
    assert first is not None and again is not None
    made = Constraint.build(first, words, len(words), [words.eos_token_id])
    assert Constraint.build(again, words, len(words), [words.eos_token_id]) is made
    assert Constraint.build(again, words, len(words), [3]) is not made


def test_a_large_vocabulary_takes_seconds_and_few_classes() -> None:
    source = random.Random(0)
    pieces = ["the", "er", "a", "b", "c", " ", "\n", '"', '": "', '", "', "{", "}", "[", "]", ",", ":", "1", "é", "中"]
    words = {bytes([byte]) for byte in range(256)}
    while len(words) < 50_000:
        words.add("".join(source.choices(pieces, k=source.randrange(1, 7))).encode()[: source.randrange(2, 30)])
    form = read_format({"type": "json_object"})
    assert form is not None
    tokens = lift(form.compiled.automaton, sorted(words), sorted(words), form.name)
    assert tokens.table.shape[1] < 3000
    assert tokens.table.nbytes < 2**24
    assert Tracker(tokens, 512).allowed(3).any()


class TestTokenizers:
    def test_bytes_of_a_byte_level_vocabulary(self) -> None:
        words = text_tokenizer()
        written, first = token_bytes(words, len(words) + 3)
        assert written == first
        assert written[words.convert_tokens_to_ids("Ġa")] == b" a"
        assert b"\xc3" in written and "é".encode() in written
        assert written[words.eos_token_id] is written[words.mask_token_id] is written[len(words)] is None

    @pytest.mark.parametrize(
        ("decoder", "regex"),
        [
            (LLAMA, " ?a[ b]?a? ?"),
            (LLAMA, "(é|a)*"),
            (decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse()]), " ?a(▁| )*é?a?"),
            (decoders.Sequence([decoders.ByteFallback(), REPLACE, decoders.Fuse()]), "(▁| |a)*é"),
            (decoders.Sequence([REPLACE, decoders.Replace("b", "x"), decoders.Fuse()]), "[abx ]*"),
            (decoders.Sequence([decoders.Fuse(), REPLACE, decoders.Strip("a", 1, 0)]), "[ab ]*"),
            (decoders.Sequence([decoders.Replace("ab", "x"), REPLACE, decoders.Fuse(), decoders.Fuse()]), "[abx ]*"),
            (decoders.Sequence([decoders.Replace(Regex("[▁]"), " "), decoders.Strip(" ", 0, 0)]), "[ab ]*"),
            (decoders.Metaspace(), " ?(a b?)* ?"),
            (decoders.Metaspace(prepend_scheme="never"), " ?(a b?)* ?"),
            (decoders.Metaspace(replacement="b"), "[a ]*"),
            (decoders.ByteLevel(), "(é|a|▁)*"),
        ],
        ids=str,
    )
    def test_exactly_the_texts_that_the_library_writes_are_allowed(self, decoder: Any, regex: str, here: None) -> None:
        pieces = ["a", "b", "▁", "▁▁", "▁a", "a▁", "a▁b", "Ã", "©", "<0xC3>", "<0xA9>", "<0xE2>", "<0x96>", "<0x81>"]
        backend = Tokenizer(BPE({piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True))
        backend.decoder = decoder
        words = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
        words.add_tokens(["é"])
        words.add_special_tokens({"eos_token": "<end>"})
        form = read_format({"type": "regex", "regex": regex})
        assert form is not None
        made = Constraint.build(form, words, len(words), [words.eos_token_id])
        for row in (each for length in (1, 2, 3) for each in itertools.product(range(len(words) - 1), repeat=length)):
            state = made.automaton.start
            for token in row:
                state = int(made.automaton.table[state, made.classes[token]])
            text = words.decode(row)
            if made.automaton.final[state]:
                assert re.fullmatch(regex, text), words.convert_ids_to_tokens(row)
            elif not any(pieces[token : token + 1] and pieces[token].startswith("<0x") for token in row):
                assert not re.fullmatch(regex, text), words.convert_ids_to_tokens(row)

    @pytest.mark.parametrize(
        ("decoder", "named"),
        [
            (decoders.WordPiece(), "its decoder is WordPiece"),
            (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]), "its decoder strips 1 and 1 of ' '"),
            (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "its decoder is Strip, Fuse"),
            (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "x")]), "its decoder replaces 'ab'"),
            (decoders.Sequence([decoders.Replace(Regex("."), "x"), decoders.Fuse()]), "its decoder replaces '.'"),
        ],
        ids=str,
    )
    def test_other_tokenizers_are_rejected(self, decoder: Any, named: str) -> None:
        backend = Tokenizer(WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
        backend.decoder = decoder
        with pytest.raises(ValueError, match=f"does not support the tokenizer of this model .{re.escape(named)}"):
            token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend), 3)


def test_sizes_are_bounded_before_and_after_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "_MOST_REPEATED", 100)
    names = [f"a{number}" for number in range(9)]
    many = {"type": "object", "properties": {name: {"type": "null"} for name in names}, "required": names}
    form = read_format({"type": "json_schema", "schema": many})
    assert form is not None
    compile_regex(form.regex, form.name)  # escapes such as \\x{22} are no repetitions
    with pytest.raises(ValueError, match="repeats parts 101 times in all"):
        compile_regex("a{60}b{1,41}", "regex")
    monkeypatch.setattr(language, "_MOST_STATES", 50)
    with pytest.raises(ValueError, match="regex has 103 states, and 50 are the most"):
        compile_regex("a{0,100}", "regex")


def test_expressions_of_strangers_are_not_tried_on_the_values_of_an_enum() -> None:
    for schema in (
        {"enum": ["a" * 60 + "!"], "pattern": "^(a+)+$"},
        {"const": {"b": "a" * 60 + "!"}, "properties": {"b": {"pattern": "^(a+)+$"}}},
    ):
        with pytest.raises(ValueError, match="json_schema has 'pattern' beside enum or const, which is not supported"):
            read_format({"type": "json_schema", "schema": schema})


def test_schemas_that_refer_to_each_other_are_translated_in_bounded_time() -> None:
    inner = {f"k{name}": {"$ref": f"#/$defs/{name}"} for name in "abcd"}
    definitions = {name: {"anyOf": [{"type": "integer"}, {"properties": inner}]} for name in "abcd"}
    with pytest.raises(ValueError, match="json_schema is too large once its references are followed"):
        read_format({"type": "json_schema", "schema": {"$defs": definitions, "$ref": "#/$defs/a"}})
    endless = {name: {"properties": inner, "required": list(inner)} for name in "abcd"}
    with pytest.raises(ValueError, match=r"too large|no value that ends"):
        read_format({"type": "json_schema", "schema": {"$defs": endless, "$ref": "#/$defs/a"}})


def test_counts_within_counts_are_multiplied_before_anything_is_compiled() -> None:
    with pytest.raises(ValueError, match="repeats parts 1001000 times in all"):
        compile_regex("(?:[0-9]{1,1000}){1,1000}", "it")
    assert compile_regex(r"(?:[(]{2}\x{61}{2}){3}", "it").accepts(b"((aa" * 3)


def test_a_minimal_automaton_has_a_state_for_each_set_of_words_that_may_follow() -> None:
    source = np.random.default_rng(0)
    for states in (2, 5, 9, 30, 60) * 8:
        table, byte = source.integers(0, states, (states, 3)), source.integers(0, 3, 256)
        table[0] = 0
        follow = table[:, byte]
        accepting = source.random(states) < 0.3
        accepting[0] = False
        different = accepting[:, None] != accepting
        for _ in range(states):
            different |= different[table[:, None], table[None]].any(-1)
        found = minimal(Automaton(follow, 1, accepting))
        assert len(found.follow) == len(np.unique(different, axis=0))
        assert not found.follow[0].any() and not found.accepting[0]
        for _ in range(50):
            word = source.integers(0, 256, source.integers(0, 9)).astype(np.uint8).tobytes()
            assert found.accepts(word) == Automaton(follow, 1, accepting).accepts(word)


def test_a_long_chain_is_minimized_in_seconds() -> None:
    chain, start = np.zeros((20_001, 256), dtype=np.int64), process_time()
    chain[1:-1, ord("a")] = np.arange(2, 20_001)
    assert len(minimal(Automaton(chain, 1, np.arange(20_001) > 0)).follow) == 20_001
    assert process_time() - start < 8


BOMB = "start: " + ' ("a"|"b")' * 24
HARD = {"type": "regex", "regex": "[ab]*a[ab]{21}"}


@pytest.mark.parametrize(
    "given",
    [HARD, {"type": "json_schema", "schema": {"pattern": HARD["regex"]}}, {"type": "grammar", "grammar": BOMB}],
)  # fmt: skip
def test_a_format_that_takes_too_long_is_refused(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SECONDS", 1)
    with pytest.raises(ValueError, match=f"^response_format of type {given['type']} takes too long .*; use a simpler"):
        dllm.Options(response_format=given)


def test_a_compilation_that_was_ended_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"type": "json_object", "depth": 1}
    whole = compiled.subprocess.CompletedProcess(
        [], 0, compiled_here(json.dumps(["json_object", None, 1, False, None]))
    )
    ends = iter([compiled.subprocess.CalledProcessError(-9, []), compiled.subprocess.TimeoutExpired([], 30), whole])

    def run(*_: object, **__: object) -> object:
        if isinstance(end := next(ends), Exception):
            raise end
        return end

    monkeypatch.setattr(compiled.subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(ValueError, match="takes too long or too much memory to compile; use a simpler one"):
            read_format(given)
    for _ in range(2):
        assert read_format(given) is not None


def test_a_signal_ends_the_compilation_at_once() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before, start = signal.signal(signal.SIGALRM, stop), monotonic()
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            dllm.Options(response_format=HARD | {"regex": "b?" + HARD["regex"]})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert monotonic() - start < 4


def test_small_choices_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.subprocess, "run", None)
    form = read_format({"type": "choice", "choice": ["yes", "né"]})
    assert form is not None
    assert form.compiled.automaton.accepts("né".encode())


def test_tokens_that_become_special_are_no_text_of_a_format() -> None:
    lm = text_model()
    lm = replace(lm, tokenizer=deepcopy(lm.tokenizer))  # others use it, too
    form = {"type": "regex", "regex": "[0-9]{3}"}
    for digits in ([], list("123456")):
        if digits:
            lm.tokenizer.add_special_tokens({"additional_special_tokens": digits})
        (text,) = dllm.generate(lm, ["Tom has 23"], gen_length=8, response_format=form).texts
        assert re.fullmatch("[0-9]{3}", text) and not set(text) & set(digits)
