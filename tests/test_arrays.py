"""Arrays and tensors of every kind, wherever a list or a number may be given."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import dllm
from dllm.decoding.prompts import encode
from dllm.evaluation.likelihood import Estimate, loglikelihood
from models import random_llada

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def unreadable() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of some that they are new
        return {
            "meta": IDS.to("meta"),
            "sparse": IDS.to_sparse(),
            "csr": IDS.to_sparse_csr(),
            "quantised": torch.quantize_per_tensor(torch.ones(2, 3), 1.0, 0, torch.quint8),
            "bits": torch.empty(2, 3, dtype=torch.bits8),
            "nested": torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])]),
            "jagged": torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged),
        }


@pytest.mark.parametrize("kind", unreadable())
def test_a_tensor_without_values_to_list_is_refused(kind: str) -> None:
    given = unreadable()[kind]
    refusal = r"is a tensor that cannot be read \(.*\); give a dense one with values"
    with pytest.raises(ValueError, match=f"^prompts {refusal}"):
        encode(given, None)
    with pytest.raises(ValueError, match=f"^prompts {refusal}"):
        encode({"input_ids": given}, None)
    with pytest.raises(ValueError, match=f"^attention_mask {refusal}"):
        encode(IDS, None, given)
    with pytest.raises(ValueError, match=f"^attention_mask {refusal}"):
        encode({"input_ids": IDS, "attention_mask": given}, None)
    for option in ("eos_token_id", "seed", "stop", "gen_length"):
        with pytest.raises(ValueError, match=f"^{option} {refusal}"):
            dllm.generate(random_llada(), [[1]], **{option: given})
    if given.layout == torch.strided and not given.is_nested:
        with pytest.raises(ValueError, match=rf"^prompts\[0\] {refusal}"):
            encode([given[0]], None)
        with pytest.raises(ValueError, match=rf"^attention_mask\[1\] {refusal}"):
            encode(IDS, None, [torch.ones(3), given[0]])
        with pytest.raises(ValueError, match=f"^target {refusal}"):
            loglikelihood(random_llada(), [1], given[0], Estimate(samples=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("row", [[np.array([1, 2])] * 3, [torch.tensor(1, device="meta")] * 3, ["1"] * 3, "111"])
def test_a_mask_of_other_things_than_numbers_is_refused(row: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("attention_mask[0] does not fit the 3 tokens")):
        encode(IDS, None, [row, row])


@pytest.mark.parametrize("row", [bytearray(b"abc"), memoryview(b"abc"), b"abc"])
def test_bytes_are_no_token_ids(row: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"prompts[0] is a {type(row).__name__}")):
        encode([row], None)


def test_an_array_of_texts_is_a_list_of_them() -> None:
    lm = random_llada(tokenizer=True)
    texts = ["Sam has 3 pens.", "Ann has 4."]
    for given in (np.array(texts), np.array(texts, dtype=object), tuple(texts)):
        assert encode(given, lm.tokenizer) == encode(texts, lm.tokenizer)


@pytest.mark.parametrize(
    ("option", "plain", "others"),
    [
        ("eos_token_id", [7, 9], (np.array([7, 9]), torch.tensor([7, 9]), (7, 9), [np.int32(7), np.uint8(9)])),
        ("eos_token_id", 7, (np.array(7), torch.tensor(7), np.int64(7))),
        ("stop", ["."], (np.array(["."]), np.array(["."], dtype=object), (".",), [np.str_(".")])),
        ("stop", ".", (np.array("."), np.str_("."))),
        ("seed", [5], (np.array([5]), torch.tensor([5]), (5,), [np.int64(5)])),
        ("seed", 5, (np.array(5), torch.tensor(5), np.int32(5))),
        ("gen_length", 6, (np.array(6), torch.tensor(6), np.int16(6))),
    ],
)
def test_arrays_and_tensors_are_taken_where_lists_and_numbers_are(option: str, plain: Any, others: Any) -> None:
    lm, fixed = random_llada(tokenizer=True), {"gen_length": 12, "temperature": 1.0, "seed": 3}
    wanted = dllm.generate(lm, ["Sam has 3 pens."], **{**fixed, option: plain})
    for other in others:
        found = dllm.generate(lm, ["Sam has 3 pens."], **{**fixed, option: other})
        assert (found.texts, found.sequences.tolist()) == (wanted.texts, wanted.sequences.tolist())


@pytest.mark.parametrize("option", ["stop_at_eos", "tempered_confidence", "eos_suppression", "top_k", "temperature"])
@pytest.mark.parametrize("value", [np.array([1, 0]), torch.tensor([1, 0])])
def test_several_values_where_one_is_wanted_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^(unknown )?{option}=\[1, 0\]( is|;)"):
        dllm.generate(random_llada(), [[1]], **{option: value})


def test_an_array_as_a_choice_of_a_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="accept=array"):
        dllm.samplers.ARGuided(accept=np.array(["topk", "ratio"]))  # type: ignore[arg-type]
