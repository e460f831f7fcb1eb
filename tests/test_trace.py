"""Traces: what is written is read again, the same bytes each time, and anything else is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from dllm.evaluation.trace import Frames, Trace

MASK, EOS = 90_000, 7
# What float16 holds exactly, so that it comes back as it was.
SHARES = st.sampled_from([np.nan, 0.0, 0.25, 0.5, 0.875, 1.0])


def frames(identity: str, steps: int, prompt: int, generated: int, seed: int = 0) -> Frames:
    random = np.random.default_rng(seed)
    tokens = lambda: random.choice([MASK, 0, 5, 126_000], size=(steps, generated))  # noqa: E731
    return Frames(
        id=identity,
        prompt=random.integers(0, 50, prompt),
        canvas=tokens(),
        predicted=tokens(),
        confidence=random.choice([np.nan, 0.125, 0.5, 1.0], size=(steps, generated)).astype(np.float32),
        drafted=tokens(),
        computed=random.random((steps, prompt + generated)) < 0.5,
        nfe=np.arange(1, steps + 1),
    )


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    lengths = draw(st.lists(st.integers(0, 6), max_size=4))
    width = max(lengths, default=draw(st.integers(0, 3)))
    tokens = np.full((len(lengths), width), EOS)
    steps, confidence = np.full(tokens.shape, -1), np.full(tokens.shape, np.nan, np.float32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = draw(st.lists(st.integers(0, 200_000), min_size=length, max_size=length))
        steps[row, :length] = draw(st.lists(st.integers(-1, 40_000), min_size=length, max_size=length))
        confidence[row, :length] = draw(st.lists(SHARES, min_size=length, max_size=length))
    shapes = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 6)), max_size=3))
    return Trace(
        ids=tuple(f"problem {row}" for row in range(len(lengths))),
        tokens=tokens,
        commit_step=steps,
        confidence=confidence,
        frames=tuple(frames(f"f{number}", *shape, seed=number) for number, shape in enumerate(shapes)),
        words=draw(st.dictionaries(st.integers(0, 200_000), st.text(), max_size=4)),
        mask_token_id=MASK,
        eos_token_ids=(EOS, 9),
        lengths=tuple(lengths) if set(lengths) - {width} else (),
    )


TRACE = Trace(
    ids=("a", "b"),
    tokens=np.array([[1, 2, 3], [4, EOS, EOS]]),
    commit_step=np.array([[0, 1, 1], [0, -1, -1]]),
    confidence=np.array([[0.5, 0.25, 1], [0.999, np.nan, np.nan]], np.float32),
    frames=(frames("a", 2, 3, 3),),
    words={1: "<b>", 2: "\ud800é", 3: "\n", 4: '"'},
    mask_token_id=MASK,
    eos_token_ids=(EOS,),
    lengths=(3, 1),
)


def assert_equal(one: Trace, other: Trace) -> None:
    for name in ("tokens", "commit_step", "confidence"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    assert len(one.frames) == len(other.frames)
    for mine, its in zip(one.frames, other.frames, strict=True):
        for name in ("prompt", "canvas", "predicted", "confidence", "drafted", "computed", "nfe"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(its, name), strict=True)
        assert mine.id == its.id
    for name in ("ids", "words", "mask_token_id", "eos_token_ids", "lengths"):
        assert getattr(one, name) == getattr(other, name)


@given(trace=traces())
@settings(max_examples=60, deadline=None)
def test_what_is_saved_is_loaded_again(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    trace.save(path)
    words = {token: text.encode("utf-8", "replace").decode() for token, text in trace.words.items()}
    assert_equal(Trace.load(path), replace(trace, words=words))


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.safetensors"
    written = set()
    for words in [TRACE.words, dict(reversed(TRACE.words.items()))] * 8:
        replace(TRACE, words=words).save(path)
        written.add(path.read_bytes())
    Trace.load(path).save(path)
    assert written == {path.read_bytes()}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_confidences_keep_three_digits(tmp_path: Path) -> None:
    shown = replace(TRACE.frames[0], confidence=np.full((2, 3), 0.99931, np.float32))
    replace(TRACE, frames=(shown,)).save(tmp_path / "t")
    loaded = Trace.load(tmp_path / "t")
    assert np.abs(loaded.frames[0].confidence - 0.99931).max() < 5e-4
    assert loaded.confidence[1, 0] == np.float32(0.999)


def test_a_run_of_many_samples_is_small(tmp_path: Path) -> None:
    size = (300, 64)
    big = replace(
        TRACE, ids=tuple(map(str, range(300))), tokens=np.ones(size, int), commit_step=np.ones(size, int),
        confidence=np.ones(size, np.float32), lengths=(), frames=(frames("0", 64, 32, 64),),
    )  # fmt: skip
    big.save(tmp_path / "t")
    assert (tmp_path / "t").stat().st_size < 300 * 64 * 8 + 64 * 64 * 14 + 64 * 96 / 8 + 5000


def test_of_single_steps_only_what_there_is_is_kept(tmp_path: Path) -> None:
    steps = generated = 128
    step, place = np.indices((steps, generated))
    one = Frames(
        "a", np.zeros(10, int), canvas=np.where(place <= step, 70_000, MASK),
        predicted=np.where(place // 32 == step // 32, 70_000, MASK),
        confidence=np.where(place // 32 == step // 32, np.float32(0.5), np.float32(np.nan)),
        drafted=np.full((steps, generated), MASK), computed=np.ones((steps, generated + 10), bool),
        nfe=np.arange(steps),
    )  # fmt: skip
    replace(TRACE, frames=(one,)).save(tmp_path / "t")
    assert_equal(Trace.load(tmp_path / "t"), replace(TRACE, frames=(one,), words={**TRACE.words, 2: "?é"}))
    assert (tmp_path / "t").stat().st_size < 4 * steps * generated / 8 + steps * 32 * 6 + generated * 4 + 3000


def test_shapes_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    shown = TRACE.frames[0]
    for wrong, named in (
        (replace(TRACE, ids=("a",)), "1 ids"),
        (replace(TRACE, tokens=np.zeros((2, 2), int)), r"tokens \(2, 2\)"),
        (replace(TRACE, lengths=(3, 4)), r"lengths=\(3, 4\)"),
        (replace(TRACE, frames=(replace(shown, computed=np.ones((2, 3), bool)),)), "computed"),
        (replace(TRACE, frames=(replace(shown, nfe=np.ones(3, int)),)), "nfe"),
    ):
        with pytest.raises(ValueError, match=named):
            wrong.save(tmp_path / "t")
    assert not list(tmp_path.iterdir())


class TestWhatIsNoTrace:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        TRACE.save(tmp_path / "t.safetensors")
        return tmp_path / "t.safetensors"

    def refused(self, path: Path, *named: str) -> None:
        with pytest.raises(ValueError) as error:  # noqa: PT011  # the words are looked at below
            Trace.load(path)
        text = str(error.value)
        assert all(word in text for word in (str(path), *named)), text
        assert "\n" not in text

    def test_a_missing_file_and_a_folder(self, path: Path) -> None:
        self.refused(path.with_name("none"), "is not there")
        self.refused(path.parent, "is not there")

    def test_another_version(self, path: Path) -> None:
        self.rewrite(path, version="2")
        self.refused(path, "version 2", "version 1", "make it again")

    @pytest.mark.parametrize("length", [0, 5, 8, 40, -400, -1])
    def test_a_file_cut_short(self, path: Path, length: int) -> None:
        path.write_bytes(path.read_bytes()[:length])
        self.refused(path)

    @given(content=st.binary(max_size=200))
    @settings(max_examples=40, deadline=None)
    def test_random_bytes(self, content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("random") / "t"
        path.write_bytes(content)
        self.refused(path)

    def test_other_safetensors(self, path: Path) -> None:
        save_file({"weight": np.zeros(3)}, path)
        self.refused(path, "is not a trace")
        save_file({"tokens": np.zeros(3)}, path, {"format": "dllm-trace", "version": "1"})
        self.refused(path, "damaged")

    @pytest.mark.parametrize("name", ["confidence", "frames.confidence"])
    @pytest.mark.parametrize("value", [np.inf, -np.inf, 1e4, -0.5, 3])
    def test_confidences_that_are_no_probabilities(self, path: Path, name: str, value: float) -> None:
        with safe_open(path, "numpy") as file:
            metadata, tensors = file.metadata(), {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
        changed = tensors[name].copy()
        changed[0] = value
        save_file({**tensors, name: changed}, path, metadata)
        self.refused(path, "damaged", f"{name} holds what is no probability")
        save_file({**tensors, name: np.ones(len(changed), np.int64)}, path, metadata)
        self.refused(path, "damaged")

    @pytest.mark.parametrize(
        "fields",
        [
            {"lengths": "[3,2]"}, {"lengths": "[4,-1]"}, {"ids": '["a"]'}, {"words": "3"}, {"width": '"x"'},
            {"width": "9000000"},
            {"frames": '[["a",9,3,3]]'}, {"frames": "[1]"}, {"ids": "["}, {"width": "-1"}, {"mask_token_id": "null"},
        ],
    )  # fmt: skip
    def test_metadata_that_does_not_fit(self, path: Path, fields: dict[str, str]) -> None:
        self.rewrite(path, **fields)
        self.refused(path, "damaged")

    def test_a_small_file_of_a_large_table(self, path: Path) -> None:
        with safe_open(path, "numpy") as file:
            metadata, tensors = file.metadata(), {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
        width, rows = 1 << 17, 100
        tensors |= {name: np.zeros(width, np.int8) for name in ("tokens", "commit_step")}
        tensors["confidence"] = np.zeros(width, np.float32)
        lengths = {"lengths": str([width] + [0] * (rows - 1)), "ids": json.dumps([str(row) for row in range(rows)])}
        save_file(tensors, path, metadata | lengths | {"width": str(width)})
        self.refused(path, "damaged", f"rows of {width} positions")

    def rewrite(self, path: Path, **fields: str) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"] |= fields
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
