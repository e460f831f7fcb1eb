"""Decodes of the published reference implementations, token for token and in at most as many forwards.

Cases lie in the files of tests/golden (a few of each kind) and, where it exists, in ../shared/golden
(all of them); tests/golden_plan.py says what each is called here. Where the reference stops at its
end-of-text, what is compared ends there. Cases with the same sampler and cache are decoded together; where rounding
makes another result of that than of a batch of one, which is the reference's, the latter counts.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dllm.models import FAMILIES
from golden_batches import Batches, Decoded, alone
from golden_plan import Plan, base_of, plan

HERE = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
SHARED_FILES = ("llada_cases.jsonl", "dream_cases.jsonl", "block/llada_policies/cases.jsonl")
BLOCK = SHARED / "block"  # models whose attention is causal over blocks, a folder for each family

# Here the reference accepts a draft that its base would not have made: its tokens are not those of its own base.
LOSSY = {
    "freedave-a-none-batch-d4-eager-0", "freedave-a-none-batch-d8-eager-0", "freedave-a-none-batch-d4-std-ct0.9-0",
    "freedave-a-none-batch-d4-std-ct0.9-2", "freedave-a-none-batch-d4-eager-ct0.9-0",
    "freedave-a-prefix-batch-d4-std-ct0.9-0", "freedave-a-dual-batch-d4-std-ct0.9-0",
}  # fmt: skip
BATCHES = Batches()


def cases(folder: Path, files: tuple[str, ...]) -> Iterator[Any]:
    for name in files:
        path = folder / name
        for line in path.read_text().splitlines() if path.exists() else ():
            case = json.loads(line)
            home = SHARED if case == shared().get(case["id"]) else folder
            planned = None if case["fragile"] else plan(case, home)
            if planned is not None:
                number = BATCHES.add(home, case, planned)
                marks = [pytest.mark.xdist_group(f"golden-{number}")]
                # Where no committed case is beside them, `make test` decodes those of every other batch.
                if folder == SHARED and number >= COMMITTED and number % 2:
                    marks.append(pytest.mark.spare)
                yield pytest.param(home, case, planned, id=case["id"], marks=marks)


def batches(folder: Path) -> Iterator[Any]:
    """Batches whose rows do not depend on each other there: without stale keys and values, or overwritten prompts."""
    path = folder / "cases.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        case = json.loads(line)
        if case["algorithm"] == "fastdllm_v2_batch" and not (case["fragile"] or case["params"]["use_block_cache"]):
            longest = max(map(len, case["prompt"]))
            if "prompt_overwritten" not in str(case.get("note")) and longest % case["params"]["block_size"] != 1:
                yield pytest.param(case, id=case["id"])


@cache
def shared() -> dict[str, Any]:
    """The shared cases, if the files they read are those here: what both folders have is decoded once then."""
    both = (path.relative_to(HERE) for path in HERE.rglob("*.*") if (SHARED / path.relative_to(HERE)).is_file())
    if not all(filecmp.cmp(HERE / path, SHARED / path, shallow=False) for path in both):
        return {}
    files = [SHARED / name for name in SHARED_FILES if (SHARED / name).exists()]
    return {case["id"]: case for path in files for case in map(json.loads, path.read_text().splitlines())}


def check(folder: Path, case: dict[str, Any], planned: Plan) -> None:
    if case["id"] in LOSSY:
        result, base = alone(folder, case, planned), alone(folder, case, planned._replace(sampler=base_of(case)))
        assert base.sequence != case["sequence"]
        assert result.sequence == base.sequence
        return
    if (beside_others := BATCHES.decode(folder, case, planned)) is not None:
        with suppress(AssertionError):
            compare(case, planned, beside_others)
            return
    compare(case, planned, alone(folder, case, planned))


def compare(case: dict[str, Any], planned: Plan, result: Decoded) -> None:
    compared = len(case["sequence"])
    if planned.options["stop_at_eos"]:  # the reference may cut what is decoded, in whole blocks, before its end
        compared = min(compared, len(case["prompt"]) + result.tokens)
    assert result.sequence[:compared] == case["sequence"][:compared]
    assert result.nfe <= case["nfe"]
    assert result.guide_nfe <= (case.get("ar_forwards") or 0)


COMMITTED_CASES = list(cases(HERE, ("cases.jsonl", "revising_and_length.jsonl")))
COMMITTED = BATCHES.count


@pytest.mark.parametrize(("folder", "case", "planned"), COMMITTED_CASES)
def test_decodes_as_the_reference(folder: Path, case: dict[str, Any], planned: Plan) -> None:
    check(folder, case, planned)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/golden is not here")
@pytest.mark.parametrize(("folder", "case", "planned"), list(cases(SHARED, SHARED_FILES)))
def test_decodes_as_the_reference_in_every_shared_case(folder: Path, case: dict[str, Any], planned: Plan) -> None:
    check(folder, case, planned)


def block_by_block() -> Iterator[Any]:
    """The cases of models with blocks, every other one with the exact cache where nothing stale is reused there."""
    for family in ("sdar", "llada2", "fastdllm_v2", *(["diffusion_gemma"] if "diffusion_gemma" in FAMILIES else [])):
        for index, each in enumerate(cases(BLOCK / family, ("cases.jsonl",))):
            folder, case, planned = each.values
            exact = index % 2 and planned.cache == "none"
            yield pytest.param(folder, case, planned._replace(cache="block") if exact else planned, id=case["id"])


@pytest.mark.skipif(not BLOCK.exists(), reason="../shared/golden/block is not here")
@pytest.mark.parametrize(("folder", "case", "planned"), list(block_by_block()))
def test_decodes_as_the_reference_block_by_block(folder: Path, case: dict[str, Any], planned: Plan) -> None:
    check(folder, case, planned)


@pytest.mark.skipif(not BLOCK.exists(), reason="../shared/golden/block is not here")
@pytest.mark.parametrize("case", list(batches(BLOCK / "fastdllm_v2")))
def test_rows_decode_as_those_of_a_batch_of_the_reference(case: dict[str, Any]) -> None:
    for prompt, sequence in zip(case["prompt"], case["sequence"], strict=True):
        single = case | {"algorithm": "fastdllm_v2_generate", "prompt": prompt, "sequence": sequence}
        planned = plan(single, BLOCK / "fastdllm_v2")
        assert planned is not None
        written = alone(BLOCK / "fastdllm_v2", single, planned).sequence
        ends = [i for i in range(len(prompt), len(sequence)) if sequence[i] == case["params"]["stop_token"]]
        count = min(len(written), len(sequence), ends[0] + 1 if ends else len(sequence))
        assert count > len(prompt)
        assert written[:count] == sequence[:count]


def test_committed_steps_are_those_of_the_reference() -> None:
    folder, case, planned = next(
        c.values for c in cases(HERE, ("cases.jsonl",)) if c.values[1]["algorithm"] == "llada_vanilla"
    )
    result = alone(folder, case, planned)
    assert result.commit_step == case["commit_step"][-case["params"]["gen_length"] :]
