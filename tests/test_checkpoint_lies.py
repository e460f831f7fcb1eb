"""Checkpoint folders that say what is not so: each is refused in one line, at once, and leads nowhere else."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, Qwen2Config, Qwen2ForCausalLM

from dllm.guide import load_guide
from dllm.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from dllm.models.loading import load
from models import (
    random_diffusion_gemma,
    random_dream,
    random_fast_dllm,
    random_llada,
    random_llada2,
    random_sdar,
    save_folder,
)

Edit = Callable[[Path], Any]
FAMILIES = ("llada", "dream")
# Names of the same thing in the two published layouts.
BLOCK = {"llada": "model.transformer.blocks", "dream": "model.layers"}
QUERY = {"llada": "model.transformer.blocks.1.q_proj.weight", "dream": "model.layers.1.self_attn.q_proj.weight"}
KEYS = {
    "layers": {"llada": "n_layers", "dream": "num_hidden_layers"},
    "hidden": {"llada": "d_model", "dream": "hidden_size"},
    "heads": {"llada": "n_heads", "dream": "num_attention_heads"},
    "mlp": {"llada": "mlp_hidden_size", "dream": "intermediate_size"},
    "length": {"llada": "max_sequence_length", "dream": "max_position_embeddings"},
}
HUGE = 10**30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good folder of each family."""
    root = tmp_path_factory.mktemp("good")
    models = {"llada": random_llada(dtype=torch.float32, tokenizer=True), "dream": random_dream(dtype=torch.float32)}
    return {name: save_folder(lm, root / name) for name, lm in models.items()}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(made: dict[str, Path], family: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[family], tmp_path / "lie"))


def refusal(folder: Path, **options: Any) -> str:
    """What loading says: one line, within a second, with no other error behind it."""
    began = time.perf_counter()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # every caller looks at the message
        load(folder, device="cpu", **options)
    assert time.perf_counter() - began < 60  # far below a second where nothing else runs
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


def config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def weights(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of the weights and leave the values as they are."""
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    content = json.loads(data[8 : 8 + length])
    change(content)
    text = json.dumps(content).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def shard(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda index: None) -> None:
    """Split the weights into two shards, and change their index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (place >= 5)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# Key of config.json, value, and what the refusal must say beside the key.
VALUES: list[tuple[str, Any]] = [
    *(("layers", value) for value in (0, -1, 1, 3, HUGE, 2**40, True, 2.0, "2", None, [2], {"a": 2})),
    *(("hidden", value) for value in (0, -32, 16, 64, HUGE, 10**9, True, 32.0, "32", [32])),
    *(("heads", value) for value in (0, -4, 5, HUGE, 4.0, "4", True)),
    *(("mlp", value) for value in (0, 63, 65, HUGE, 10**12, 64.0, "64")),
    *(("length", value) for value in (0, -1, HUGE, 256.0, "256", True)),
    *(("vocab_size", value) for value in (0, -1, 1, HUGE, 10**10, 64.0, "64", True)),
    *(("rms_norm_eps", value) for value in (0, -1e-6, "1e-6", True, [1e-6], float("inf"), float("nan"))),
    *(("rope_theta", value) for value in (0, -1.0, "1e4", True, float("inf"), float("nan"))),
    *(("mask_token_id", value) for value in (-1, HUGE, 10**6, None, "1", 1.0, True, [1])),
    *(("eos_token_id", value) for value in (-1, HUGE, 10**6, None, [], "0", 0.0, True, [0, "1"], [[0]], {"a": 0})),
    *(("dtype", value) for value in ("float8", "int8", "int64", "complex64", "nn", 5, ["float32"])),
    *(("torch_dtype", value) for value in ("float8_e4m3fn", "bool", "quint8")),
    *(
        ("quantization_config", value)
        for value in (5, "int8", [1], {}, {"quant_method": "evil"}, {"quant_method": 5}, {"quant_method": []})
    ),
    *(("quantization_config", {"quant_method": method}) for method in ("eetq", "fp8", "mxfp4", "metal", "gguf")),
    *(("num_labels", value) for value in (10**7, HUGE, -1, "2", 2.5)),
    *(("id2label", value) for value in (5, "a", [1])),
    *(("architectures", value) for value in ("LLaDAModelLM", 5, [5], {"a": 1})),
    *(("auto_map", value) for value in (5, "modeling.Model", ["modeling.Model"])),
    *(("pad_token_id", value) for value in ("0", 1.5, True, [0])),
    *(("attention_dropout", value) for value in ("0", [0], True)),
    *(
        ("attn_implementation", value)
        for value in ("org/kernel", "flash_attention_2", {"": "org/kernel"}, 5, ["eager"])
    ),
    *((f"_attn_implementation{end}", "org/kernel@main:attention") for end in ("", "_internal")),
    *((key, "org/kernel") for key in ("experts_implementation", "_experts_implementation", "use_kernels")),
    ("kernel_config", {"kernel_mapping": {"RMSNorm": "org/kernel:RMSNorm"}}),
    ("fusion_config", {"anything": True}),
    ("configuration_files", ["config.4.0.0.json"]),
    ("transformers_weights", "../other.safetensors"),
    ("distributed_config", {"tp_size": 2}),
    ("per_layer_config", {"0": {"hidden_size": 5}}),
    ("tie_word_embeddings", True),
]


@pytest.mark.parametrize(("key", "value"), VALUES, ids=lambda part: repr(part)[:40])
def test_a_config_with_a_wrong_value_is_refused_by_the_name_of_its_key(folder: Path, family: str, key: str, value: Any):
    published = KEYS.get(key, {}).get(family, key)
    if key == "vocab_size" and family == "llada":
        config(folder, embedding_size=value)
    config(folder, **{published: value})
    message = refusal(folder)
    assert str(folder) in message
    at_odds_with_the_weights = "copy config.json and weights of one model again" in message
    # Labels of the embedding are one thing under two names.
    assert published in message or "embedding_size" in message or "quant_method" in message or at_odds_with_the_weights


def _text(name: str, content: str | bytes) -> Edit:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def _more(key: str, name: str = "config.json") -> Edit:
    """Say a key twice."""
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace("{", f'{{"{key}": 1, ', 1))


def _retype(dtype: torch.dtype, name: str = "") -> Edit:
    def edit(folder: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            chosen = name or next(each for each in tensors if each in QUERY.values())
            tensors[chosen] = tensors[chosen].to(dtype)

        weights(folder, change)

    return edit


def _relabel(dtype: str) -> Edit:
    return lambda folder: header(
        folder, lambda content: [content[name].update(dtype=dtype) for name in _queries(content)]
    )


def _queries(content: dict[str, Any]) -> list[str]:
    return [name for name in content if name in QUERY.values()]


def _reshape(shape: list[int]) -> Edit:
    return lambda folder: header(
        folder, lambda content: [content[name].update(shape=shape) for name in _queries(content)]
    )


def _point(file: Any) -> Edit:
    return lambda folder: shard(folder, lambda index: index["weight_map"].update({min(index["weight_map"]): file}))


def _index(**entries: Any) -> Edit:
    return lambda folder: shard(folder, lambda index: index.update(entries))


def _twice(folder: Path) -> None:
    shard(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    taken = next(iter(load_file(second).items()))
    weights(folder, lambda tensors: tensors.update([taken]), first.name)


def _incomplete(folder: Path) -> None:
    shard(folder, lambda index: index["weight_map"].pop(max(index["weight_map"])))


def _linked_to_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder)


def _linked_to_nothing(folder: Path) -> None:
    shard(folder)
    file = min(folder.glob("model-*.safetensors"))
    file.unlink()
    file.symlink_to(folder / "gone")


def _pipe(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


def _pickled(content: Callable[[dict[str, Tensor]], Any], legacy: bool = False) -> Edit:
    def edit(folder: Path) -> None:
        found = content(load_file(folder / "model.safetensors"))
        torch.save(found, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        (folder / "model.safetensors").unlink()

    return edit


def _programmed(program: bytes, legacy: bool = False) -> Edit:
    """A file whose tensors are what a pickle makes."""

    def edit(folder: Path) -> None:
        _pickled(lambda tensors: tensors, legacy)(folder)
        path, whole = folder / "pytorch_model.bin", b"\x80\x02" + program + b"."
        if legacy:
            begin = io.BytesIO(path.read_bytes())
            for _ in range(3):
                pickle.load(begin)
            path.write_bytes(begin.getvalue()[: begin.tell()] + whole + pickle.dumps([], 2))
            return
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (("data.pkl", whole), ("version", b"3\n"), ("byteorder", b"little")):
                archive.writestr(f"archive/{name}", content)

    return edit


def _deflated(folder: Path) -> None:
    """A pickle that is much larger than its file."""
    _pickled(lambda tensors: tensors)(folder)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in parts.items():
            bomb = name.endswith("data.pkl")
            new.writestr(name, content + bytes(bomb * 10**8), zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED)


def _same_ids(folder: Path) -> None:
    config(folder, eos_token_id=json.loads((folder / "config.json").read_text())["mask_token_id"])


def _same_ids_in_generation(folder: Path) -> None:
    mask = json.loads((folder / "config.json").read_text())["mask_token_id"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, mask]}))


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("executed", "w"))


DEEP = "[" * 100_000
GENERATION, INDEX = "generation_config.json", "model.safetensors.index.json"


def _tokenizer(folder: Path) -> None:
    random_llada(tokenizer=True).tokenizer.save_pretrained(folder)  # type: ignore[union-attr]  # it has one


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _growing(name: str, parts: list[dict[str, Any]]) -> Edit:
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}.get(
        name, "processors"
    )

    def edit(folder: Path) -> None:
        _tokenizer(folder)
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: {"type": "Sequence", inner: parts}}))

    return edit


def _added(folder: Path, changes: dict[str, Any]) -> None:
    """Change the last added token."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1] |= changes
    path.write_text(json.dumps(content))


FILES: dict[str, tuple[Edit, str]] = {
    "eos is the mask": (_same_ids, "eos_token_id"),
    "generation: eos is the mask": (_same_ids_in_generation, f"{GENERATION}: eos_token_id"),
    **{
        f"generation: eos={value}": (
            _text(GENERATION, json.dumps({"eos_token_id": value})),
            f"{GENERATION}: eos_token_id",
        )
        for value in (-1, HUGE, "0", 0.5, True, [0, "x"], [[0]], {"a": 1}, 10**6)
    },
    "generation: deep": (_text(GENERATION, '{"a":' + DEEP), f"{GENERATION} is not JSON"),
    "generation: a list": (_text(GENERATION, "[]"), f"{GENERATION} holds a JSON list"),
    "config: deep": (_text("config.json", '{"a":' + DEEP), "config.json is not JSON"),
    "config: deep, but not too deep to parse": (
        lambda folder: config(folder, sliding_window=json.loads("[" * 300 + "]" * 300)),
        "config.json is nested too deep",
    ),
    "config: not UTF-8": (_text("config.json", b'{"a": "\xff"}'), "config.json is not JSON"),
    "config: of nothing": (_text("config.json", ""), "config.json is not JSON"),
    "config: far too long": (_text("config.json", "{}" + " " * (10**7 + 1)), "config.json is of"),
    "config: a key twice": (_more("model_type"), "model_type"),
    "config: a pipe": (_pipe("config.json"), "config.json"),
    "weights: a pipe": (_pipe("model.safetensors"), "model.safetensors"),
    "weights: a folder": (_linked_to_a_folder, "model.safetensors"),
    "weights: integer": (_retype(torch.int64), "I64"),
    "weights: bytes": (_retype(torch.uint8), "U8"),
    "weights: boolean": (_retype(torch.bool), "BOOL"),
    "weights: complex": (_retype(torch.complex64), "C64"),
    "weights: float8": (_retype(torch.float8_e4m3fn), "F8_E4M3"),
    "weights: said to be integers": (_relabel("I32"), "I32"),
    "weights: said to be half as wide": (_relabel("F16"), "damaged"),
    "weights: said to be of no type": (_relabel("F99"), "damaged"),
    "weights: transposed": (_reshape([1024, 1]), "another shape"),
    "weights: of no values": (_reshape([0, 32]), "damaged"),
    "weights: huge": (_reshape([10**9, 10**9]), "damaged"),
    "weights: beyond counting": (_reshape([2**62, 2**62]), "damaged"),
    "weights: negative": (_reshape([-32, -32]), "damaged"),
    "weights: a header beyond the file": (_text("model.safetensors", struct.pack("<Q", 10**7) + b"{}"), "damaged"),
    "weights: a header beyond counting": (_text("model.safetensors", struct.pack("<Q", 2**63) + b"{}"), "damaged"),
    "weights: a deep header": (
        _text("model.safetensors", struct.pack("<Q", 200_006) + b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "damaged",
    ),
    "weights: nothing": (_text("model.safetensors", b""), "damaged"),
    "weights: no tensors": (_text("model.safetensors", struct.pack("<Q", 2) + b"{}"), "is missing"),
    "weights: of a distributed run": (_text("shard-00001-model-00001-of-00001.safetensors", b""), "distributed"),
    **{f"index: points to {file}": (_point(file), "the index") for file in ("model-00002-of-00002.safetensors",)},
    **{
        f"index: points to {str(file)[:20]}": (_point(file), INDEX)
        for file in (
            "../x.safetensors",
            "/etc/x.safetensors",
            "a/b.safetensors",
            "..",
            "",
            "x.bin",
            5,
            None,
            [],
            {},
            "a\0.safetensors",
        )
    },
    "index: points to no file": (_point("gone.safetensors"), "gone.safetensors is missing"),
    "index: incomplete": (_incomplete, "the index"),
    "index: a tensor in two shards": (_twice, "as well"),
    "index: a linked shard that is gone": (_linked_to_nothing, "is missing"),
    "index: no map": (_index(weight_map=None), INDEX),
    "index: an empty map": (_index(weight_map={}), INDEX),
    "index: a list for a map": (_index(weight_map=["a"]), INDEX),
    "index: no metadata": (_index(metadata=None), INDEX),
    "index: deep": (lambda folder: [shard(folder), _text(INDEX, DEEP)(folder)], INDEX),
    "index: a key twice": (lambda folder: [shard(folder), _more("weight_map", INDEX)(folder)], "weight_map"),
    "pickle: code": (_pickled(lambda tensors: tensors | {"trap": Trap()}), "pytorch_model.bin"),
    "pickle: a list": (_pickled(lambda tensors: list(tensors.values())), "not a table of tensors"),
    "pickle: numbers": (_pickled(lambda tensors: tensors | {"a": 5}), "not a table of tensors"),
    "pickle: integers": (_pickled(lambda tensors: {name: each.long() for name, each in tensors.items()}), "int64"),
    "pickle: compressed": (_deflated, "pytorch_model.bin is damaged"),
    "pickle: a sparse tensor": (_pickled(lambda tensors: tensors | {"a": torch.ones(2, 2).to_sparse()}), "damaged"),
    **{
        f"pickle{kind}: {what}": (_programmed(program, legacy), "pytorch_model.bin is damaged")
        for kind, legacy in (("", False), (" of torch before 1.6", True))
        for what, program in {
            "a deep key": b"}(K\x01" + b"\x85" * 10**6 + b"K\x01u",
            "a deep key of pairs": b"}(K\x01" + b"K\x01\x86" * 10**6 + b"K\x01u",
            "a deep key of itself": b"}(K\x01" + b"q\x00h\x00\x86" * 10**6 + b"K\x01u",
            "many bytes": b"c__builtin__\nbytearray\n\x8a\x05" + (2 * 10**10).to_bytes(5, "little") + b"\x85R",
            "a slow encoding": b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x08\x00\x00\x00punycode\x86R",
            "nothing": b"0",
        }.items()
    },
    "pickle: one tensor less": (_pickled(lambda tensors: dict(list(tensors.items())[1:])), "is missing"),
    **{
        f"pickle{kind}: {what}": (
            _pickled(
                lambda tensors, change=change: {  # type: ignore[misc]  # a default
                    name: change(each) for name, each in tensors.items()
                },
                legacy,
            ),
            words,
        )
        for kind, legacy in (("", False), (" of torch before 1.6", True))
        for what, change, words in (
            ("another shape", lambda each: each[:1], "another shape"),
            ("a number for a tensor", lambda each: torch.zeros(1).expand(each.shape), "smaller than the tensors"),
        )
    },
    "tokenizer: deep": (_text("tokenizer.json", '{"a":' + DEEP), "tokenizer"),
    **{
        f"tokenizer: a {name} that {what}": (_growing(name, parts), said)
        for name, said in (("normalizer", "its normalizer and pre_tokenizer"), ("decoder", "its decoder"))
        for what, parts in (
            ("doubles a letter 36 times", [_replace({"String": "T"}, "TT")] * 36),
            ("doubles all letters", [_replace({"Regex": "."}, "ab")] * 36),
            ("writes a book", [_replace({"String": "T"}, "T" * 10**6)]),
        )
    },
    "tokenizer: bytes of bytes": (_growing("pre_tokenizer", [BYTES] * 36), "may make more than 10000 letters"),
    "tokenizer: steps without end": (_growing("normalizer", [{"type": "Strip"}] * 1001), "more than 1000 steps"),
    "tokenizer: a table that the library cannot read": (
        lambda folder: [
            _growing("normalizer", [{"type": "Precompiled", "precompiled_charsmap": "CAAAAP///////wAA"}])(folder),
            _added(folder, {"normalized": True}),
        ],
        "index out of bounds",
    ),
    "tokenizer: a token of a book": (
        lambda folder: [_tokenizer(folder), _added(folder, {"id": 254, "content": "T" * 10_001})],
        "more than 10000 letters of the token 'TTTT",
    ),
    "tokenizer: a text again and again": (
        _growing(
            "post_processor",
            [
                {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 5000,
                    "pair": [],
                    "special_tokens": {},
                }
            ],
        ),
        "its post_processor makes more than 1000 tokens",
    ),
    "tokenizer config: endless": (
        lambda folder: [_tokenizer(folder), os.truncate(folder / "tokenizer_config.json", 2 * 10**9)],
        "too long for a tokenizer",
    ),
    "tokenizer config: deep": (
        lambda folder: [_tokenizer(folder), _text("tokenizer_config.json", '{"a":' + DEEP)(folder)],
        "tokenizer_config.json",
    ),
    "tokenizer config: another file": (
        lambda folder: [_tokenizer(folder), _tokenizer_config(folder, fast_tokenizer_files=["../tokenizer.1.0.json"])],
        "fast_tokenizer_files",
    ),
    **{
        f"tokenizer config: {key}": (
            lambda folder, key=key, value=value: [_tokenizer(folder), _tokenizer_config(folder, **{key: value})],
            "tokenizer",
        )
        for key, value in {
            "added_tokens_decoder": {"10000000": {"content": "<x>"}},
            "eos_token": 5,
            "pad_token": "a",
            "vocab": "/etc/passwd",
            "init_inputs": ["/etc/passwd"],
            "tokenizer_object": {"a": 1},
            "extra_special_tokens": 5,
        }.items()
    },
    # They would vanish from every text.
    **{
        f"an ordinary word is special: {file}, {key}={json.dumps(value)}": (
            lambda folder, file=file, key=key, value=value: [
                _tokenizer(folder),
                (folder / file).write_text(json.dumps({key: value})),
            ],
            "name ' answer' as special or added, an ordinary token",
        )
        for file, key, value in (
            ("tokenizer_config.json", "eos_token", " answer"),
            ("tokenizer_config.json", "additional_special_tokens", [" answer"]),
            ("tokenizer_config.json", "extra_special_tokens", [" answer"]),
            ("tokenizer_config.json", "image_token", " answer"),
            ("tokenizer_config.json", "added_tokens_decoder", {"31": {"content": " answer", "special": True}}),
            ("tokenizer_config.json", "added_tokens_decoder", {"31": {"content": " answer", "special": False}}),
            ("special_tokens_map.json", "eos_token", " answer"),
            ("special_tokens_map.json", "additional_special_tokens", [" answer"]),
        )
    },
}


def _tokenizer_config(folder: Path, **entries: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("lie", FILES)
def test_a_folder_whose_files_are_not_what_they_should_be_is_refused(
    folder: Path, lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    edit, expected = FILES[lie]
    edit(folder)
    assert expected in refusal(folder)
    assert not (tmp_path / "executed").exists()


def test_ids_beyond_the_tokens_that_mean_something_are_no_special_ids(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["llada"], tmp_path / "lie"))
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    config(folder, vocab_size=vocab - 1, mask_token_id=vocab - 1)
    assert f"mask_token_id={vocab - 1}" in refusal(folder)


@pytest.mark.parametrize("make", [random_sdar, random_llada2])
@pytest.mark.parametrize("size", [2**24, 2**40, 2**62, HUGE])
def test_a_head_of_any_size_is_one_line(make: Any, size: int, tmp_path: Path) -> None:
    folder = save_folder(make(dtype=torch.float32), tmp_path)
    config(folder, head_dim=size)
    refusal(folder)


@pytest.mark.parametrize("make", [random_fast_dllm, random_diffusion_gemma])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_tied_tensor_that_is_stored_with_other_values_is_refused(make: Any, pickled: bool, tmp_path: Path) -> None:
    folder = save_folder(make(dtype=torch.float32), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    source = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    if make is random_fast_dllm:
        config(folder, tie_word_embeddings=True)
    if pickled:
        (folder / "model.safetensors").unlink()

    def store(head: Tensor) -> None:
        if pickled:
            torch.save({**tensors, "lm_head.weight": head}, folder / "pytorch_model.bin")
        else:
            save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})

    store(tensors[source].clone())
    load(folder, device="cpu")
    store(tensors[source].double())  # the same in another precision
    load(folder, device="cpu")
    for other in (tensors[source] + 1, (tensors[source] + 1).bfloat16(), tensors[source].double() + 1):
        store(other)
        assert "tensor lm_head.weight differs from model." in refusal(folder)


class TestNothingIsFetchedOrImported:
    """Kernels, code and other files that a folder may name."""

    ATTACKS: ClassVar[tuple[dict[str, Any], ...]] = (
        {"attn_implementation": "evil/kernel"},
        {"attn_implementation": {"": "evil/kernel", "text_config": "evil/kernel"}},
        {"_attn_implementation": "evil/kernel@main:attention"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": "paged|evil/kernel"},
        {"experts_implementation": "evil/kernel"},
        {"use_kernels": True, "kernel_config": {"RMSNorm": "evil/kernel:RMSNorm"}},
        {"auto_map": {"AutoConfig": "evil_module.Config", "AutoModel": "evil_module.Model"}, "custom_generate": "evil"},
        {"quantization_config": {"quant_method": "eetq", "weights": "int8"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"transformers_weights": "../elsewhere.safetensors"},
        {"configuration_files": ["config.1.0.0.json"]},
        {"text_config": {"_attn_implementation": "evil/kernel", "model_type": "qwen2"}},
    )
    # Transformers asks whether to run the code of a type that it does not know.
    UNKNOWN: ClassVar[tuple[dict[str, Any], ...]] = (
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil_module.C", "AutoModelForCausalLM": "evil_module.M"}},
        {"auto_map": {"AutoModelForCausalLM": "evil_module.M"}, "model_type": "vit"},
    )

    @pytest.fixture
    def led(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What was fetched, and which code of others was run."""
        found: list[str] = []

        def record(what: str) -> Callable[..., Any]:
            def caught(*args: Any, **kwargs: Any) -> Any:
                found.append(f"{what} {args[:2]}")
                raise OSError(f"{what} is not to be called here")

            return caught

        def agree(question: str = "") -> str:
            found.append(question)
            return "y"

        monkeypatch.setattr("builtins.input", agree)
        monkeypatch.setattr(socket, "getaddrinfo", record("network"))
        monkeypatch.setattr(socket.socket, "connect", record("network"))
        for module in ("transformers.modeling_utils", "transformers.integrations.hub_kernels"):
            for name in ("lazy_import_flash_attention", "get_kernel", "load_and_register_attn_kernel"):
                if hasattr(sys.modules.get(module), name):
                    monkeypatch.setattr(f"{module}.{name}", record(name))
        code = tmp_path / "evil_module.py"
        code.write_text("raise SystemExit('code of a checkpoint was run')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        return found

    @pytest.mark.parametrize("attack", ATTACKS, ids=str)
    def test_by_any_way_to_load_a_folder(
        self, folder: Path, family: str, attack: dict[str, Any], led: list[str]
    ) -> None:
        (folder / "evil_module.py").write_text("import evil_module")
        (folder / "config.1.0.0.json").write_text((folder / "config.json").read_text())
        config(folder, **attack)
        kind = LLaDAModelLM if family == "llada" else DreamModel
        ways = (lambda: load(folder, device="cpu"), lambda: AutoModel.from_pretrained(folder))
        for way in (*ways, lambda: kind.from_pretrained(folder)):
            with suppress(ValueError):
                way()
        assert led == []

    @pytest.mark.parametrize("attack", UNKNOWN, ids=str)
    def test_by_its_type(self, folder: Path, attack: dict[str, Any], led: list[str]) -> None:
        (folder / "evil_module.py").write_text("import evil_module")
        config(folder, **attack)
        with suppress(ValueError):
            load(folder, device="cpu")
        assert led == []

    @pytest.mark.parametrize("attack", [*ATTACKS, *UNKNOWN], ids=str)
    def test_by_a_guide(self, golden: Path, tmp_path: Path, attack: dict[str, Any], led: list[str]) -> None:
        folder = Path(shutil.copytree(golden / "qwen2-rand-guide", tmp_path / "guide"))
        config(folder, **attack)
        foreign = {"auto_map": {"AutoTokenizer": ["evil_module.T", None]}, "custom_generate": "evil"}
        for file in ("tokenizer_config.json", "generation_config.json"):
            (folder / file).write_text(json.dumps(foreign))
        (folder / "evil_module.py").write_text("import evil_module")
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text("import evil_module")
        said = ""
        try:
            load_guide(str(folder), torch.device("cpu"))
        except ValueError as error:
            said = str(error)
        assert "trust_remote_code" not in said
        assert led == []

    @pytest.mark.parametrize("name", ["evil/kernel", "flash_attention_2", {"": "evil/kernel"}], ids=str)
    def test_by_configs_and_models_in_memory(self, name: Any, led: list[str]) -> None:
        for kind in (LLaDAConfig, DreamConfig):
            for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
                with pytest.raises(ValueError, match=f"{key}="):
                    kind(**{key: name})
        backbone: Any = random_llada().backbone
        with pytest.raises(ValueError, match="attn_implementation="):
            backbone.set_attn_implementation(name)
        backbone.config._attn_implementation_internal = name
        with pytest.raises(ValueError, match="attn_implementation="):
            type(backbone)(backbone.config)
        assert led == []

    def test_the_trap_would_notice(self, led: list[str]) -> None:
        small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 8}
        with pytest.raises(OSError, match="is not to be called here"):
            Qwen2ForCausalLM(Qwen2Config(**small, attn_implementation="evil/kernel"))
        assert led


def _guide(**entries: Any) -> Edit:
    """Another config, with these entries alone."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4}
    return lambda folder: (folder / "config.json").write_text(json.dumps(sizes | entries))


def _own_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


class TestGuides:
    """The same for the causal model of `ar_guided`, which may be of any architecture that transformers has."""

    LIES: ClassVar[dict[str, tuple[Edit, str]]] = {
        "layers": (lambda folder: config(folder, num_hidden_layers=10**6), "num_hidden_layers=1000000"),
        "hidden": (lambda folder: config(folder, hidden_size=10**6), "hidden_size=1000000"),
        "vocabulary": (lambda folder: config(folder, vocab_size=10**7), "vocab_size=10000000"),
        "sizes beyond counting": (lambda folder: config(folder, intermediate_size=HUGE), "intermediate_size="),
        "a size as text": (lambda folder: config(folder, hidden_size="64"), "hidden_size='64'"),
        "labels": (lambda folder: config(folder, num_labels=10**7), "num_labels=10000000"),
        "an unknown type": (lambda folder: config(folder, dtype="float8"), "dtype='float8'"),
        "infinite": (lambda folder: config(folder, rms_norm_eps=float("inf")), "rms_norm_eps=inf"),
        "deep": (_text("config.json", '{"a":' + DEEP), "config.json is not JSON"),
        "generation deep": (_text("generation_config.json", DEEP), "generation_config.json is not JSON"),
        "an adapter": (_text("adapter_config.json", '{"base_model_name_or_path": "evil/base"}'), "adapter_config.json"),
        "integers": (
            lambda folder: weights(folder, lambda tensors: tensors.update(a=torch.ones(2, dtype=torch.long))),
            "I64",
        ),
        "damaged": (_text("model.safetensors", b"{}"), "damaged"),
        "index elsewhere": (_point("../x.safetensors"), INDEX),
        "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
        "an unknown architecture": (lambda folder: config(folder, model_type="evil"), "evil"),
        "heads as text": (lambda folder: config(folder, num_attention_heads="a"), "is not a causal language model"),
        "heads that are wide": (lambda folder: config(folder, head_dim=10**9), "weights, and at most"),
        "experts": (_guide(model_type="mixtral", num_local_experts=10**5), "num_local_experts=100000"),
        "some experts": (_guide(model_type="mixtral", num_local_experts=1000), "weights, and at most"),
        "layers by another name": (_guide(model_type="gpt2", n_layer=10**6, n_head=4, n_embd=32), "n_layer=1000000"),
        "some layers": (_guide(model_type="gpt2", n_layer=900, n_head=4, n_embd=32), "weights, and at most"),
        "positions": (
            _guide(model_type="gpt2", n_positions=10**7, n_head=4, n_embd=32, n_layer=1),
            "are plausible",
        ),
        "blocks": (_guide(model_type="xlstm", num_blocks=300000, num_heads=4), "num_blocks=300000"),
        "repetitions in a list": (
            _guide(model_type="gpt_neo", attention_types=[[["global"], 4 * 10**9]], num_layers=4, num_heads=4),
            "4000000000 in attention_types",
        ),
        "sizes of a part": (_guide(model_type="llama4"), "weights, and at most"),
        "width by another name": (_guide(model_type="opt", ffn_dim=10**9, num_hidden_layers=2), "are plausible"),
        "a tied head of its own": (
            lambda folder: [config(folder, tie_word_embeddings=True), weights(folder, _own_head)],
            "tensor lm_head.weight differs from",
        ),
        "no eps": (lambda folder: config(folder, rms_norm_eps=None), "is not a causal language model"),
    }

    @pytest.mark.parametrize("lie", LIES)
    def test_one_that_is_not_what_it_says_is_refused(self, golden: Path, tmp_path: Path, lie: str) -> None:
        folder = Path(shutil.copytree(golden / "qwen2-rand-guide", tmp_path / "guide"))
        edit, expected = self.LIES[lie]
        edit(folder)
        began = time.perf_counter()
        with pytest.raises(ValueError, match="guide=") as caught:
            load_guide(str(folder), torch.device("cpu"))
        assert time.perf_counter() - began < 60
        assert expected in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_a_config_keeps_what_is_published_and_drops_the_rest(family: str) -> None:
    kind: Any = LLaDAConfig if family == "llada" else DreamConfig
    kept = {"bos_token_id": 3, "attention_dropout": 0.0, "auto_map": {"AutoModel": "a.B"}}
    saved = kind(
        **kept, extra_files=["../x"], get_text_config=5, attribute_map={"a": "b"}, output_attentions=True
    ).to_dict()
    assert {key: saved[key] for key in kept} == kept
    assert not {"extra_files", "get_text_config", "attribute_map"} & saved.keys()
    assert not saved.get("output_attentions")


def test_shards_load_as_one_file_does(folder: Path, made: dict[str, Path], family: str) -> None:
    shard(folder)
    one, several = load(made[family], device="cpu"), load(folder, device="cpu")
    assert one.backbone.fingerprint() == several.backbone.fingerprint()
