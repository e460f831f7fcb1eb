"""AR-guided diffusion: the run of drafts that a causal model agrees with, row by row."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import dllm
from dllm.evaluation.word_problems import evaluate
from dllm.guide import Guide, load_guide
from dllm.samplers import ARGuided
from dllm.tasks import word_problems
from models import random_dream, random_guide, random_llada, save_folder

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50], [11, 12]]
GUIDE = random_guide()
POLICIES = [
    ARGuided(GUIDE),
    ARGuided(GUIDE, "topk", top_k=7),
    ARGuided(GUIDE, "ratio", top_k=20, ratio=0.1),
    ARGuided(GUIDE, on_reject="guide"),
    ARGuided(GUIDE, "topk", top_k=3, on_reject="guide"),
]


def holds(policy: ARGuided, logits: torch.Tensor, draft: int) -> bool:
    probability = logits.softmax(-1)
    if policy.accept == "argmax":
        return int(probability.argmax()) == draft
    among = draft in probability.topk(policy.top_k).indices.tolist()
    return among and (policy.accept == "topk" or float(probability[draft]) >= policy.ratio * float(probability.max()))


@torch.no_grad()
def by_hand(lm: dllm.LanguageModel, policy: ARGuided, row: list[int], block: int) -> tuple[list[int], int, int]:
    """One row, one position at a time, the guide reading everything anew: tokens, forwards, guide forwards."""
    mask, tokens = lm.backbone.mask_token_id, list(row)
    start = tokens.index(mask)
    nfe = asked = 0
    for low in range(start, len(tokens), block):
        while masks := [i for i in range(low, min(low + block, len(tokens))) if tokens[i] == mask]:
            logits = lm.backbone(torch.tensor([tokens])).logits[0].roll(lm.backbone.logits_shift, 0)
            logits[:, mask] = -torch.inf
            nfe += 1
            if len(masks) == 1 and policy.on_reject == "draft":
                tokens[masks[0]] = int(logits[masks[0]].argmax())
                continue
            draft = [int(logits[i].argmax()) if i in masks else tokens[i] for i in range(masks[-1] + 1)]
            expects = policy.guide(torch.tensor([draft])).logits[0]  # type: ignore[operator]
            asked += 1
            good = 0
            while good < len(masks) and holds(policy, expects[masks[good] - 1], draft[masks[good]]):
                good += 1
            if policy.on_reject == "guide" and good < len(masks):
                expects[:, mask] = -torch.inf
                draft[masks[good]] = int(expects[masks[good] - 1].argmax())
                good += 1
            for i in masks[: max(good, 1)]:
                tokens[i] = draft[i]
    return tokens, nfe, asked


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.accept}-{p.on_reject}")
@pytest.mark.parametrize("block", [6, None])
def test_a_ragged_batch_is_what_each_row_is_by_hand(make: Any, policy: ARGuided, block: int | None) -> None:
    lm = make()
    result = dllm.generate(lm, PROMPTS, policy, gen_length=17, block_length=block, stop_at_eos=False)
    mask = lm.backbone.mask_token_id
    for i, prompt in enumerate(PROMPTS):
        wanted, nfe, asked = by_hand(lm, policy, [*prompt, *[mask] * 17], block or 17)
        assert result.sequences[i, -len(wanted) :].tolist() == wanted
        assert (int(result.nfe[i]), int(result.guide_nfe[i])) == (nfe, asked)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.accept}-{p.on_reject}")
def test_infilled_rows_count_what_is_given_as_accepted(policy: ARGuided) -> None:
    lm = random_llada()
    m = lm.backbone.mask_token_id
    rows = [[4, m, 5, m, m, 8, 9, m, m], [3, m, m, 4, m], [1, 2, 3, m, 7, *[m] * 6, 9]]
    result = dllm.infill(lm, rows, policy, block_length=5)
    for i, row in enumerate(rows):
        wanted, nfe, asked = by_hand(lm, policy, row, 5)
        assert result.sequences[i, -len(row) :].tolist() == wanted
        assert (int(result.nfe[i]), int(result.guide_nfe[i])) == (nfe, asked)


def test_a_guide_that_agrees_with_everything_needs_one_forward_a_block() -> None:
    result = dllm.generate(random_llada(), PROMPTS, ARGuided(GUIDE, "topk", top_k=64), gen_length=18, block_length=6)
    assert (result.nfe <= 3).all()
    assert (result.guide_nfe <= result.nfe).all()


def test_no_step_commits_nothing_however_little_the_guide_agrees() -> None:
    lm = random_llada()
    options: dict[str, Any] = {"gen_length": 12, "block_length": 6, "stop_at_eos": False}
    mask, unfinished = lm.backbone.mask_token_id, torch.ones(len(PROMPTS), dtype=torch.bool)
    for frame in dllm.stream(lm, PROMPTS, ARGuided(GUIDE, "ratio", top_k=1, ratio=1.0), **options):
        assert torch.equal(frame.committed.any(-1), unfinished)
        unfinished = (frame.tokens == mask).any(-1)
    assert not (frame.tokens == lm.backbone.mask_token_id).any()


def test_guide_forwards_are_counted_and_timed_apart_and_read_little_twice() -> None:
    guide, read = random_guide(), [0]
    guide.register_forward_pre_hook(
        lambda _, args, kwargs: read.__setitem__(0, read[0] + kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    lm = random_llada()
    found = dllm.generate(lm, [list(range(30))], ARGuided(guide), gen_length=24, block_length=8, stop_at_eos=False)
    assert 0 < found.guide_nfe[0] <= found.nfe[0]
    assert 0 < found.stats.guide_seconds < found.stats.seconds
    # The prompt once, and at most the rest of a block each time.
    assert read[0] <= 30 + 8 * int(found.guide_nfe[0])
    assert found.stats.computed_columns == 54 * int(found.nfe[0])
    assert dllm.generate(lm, [[3]], "vanilla", gen_length=4).stats.guide_seconds == 0


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_guide_on_another_device_is_refused(wrapped: bool) -> None:
    model = random_guide().to("meta")
    guide = ARGuided(Guide(model, None) if wrapped else model)
    with pytest.raises(ValueError, match=r"guide='Qwen2ForCausalLM' is on meta and the model on cpu; move one of them"):
        dllm.generate(random_llada(), [[3]], guide, gen_length=4)


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_the_bundled_guide_saves_most_forwards(name: str) -> None:
    lm, problems = dllm.load(name, device="cpu"), word_problems.problems(30, 3_000_001)
    options = {"gen_length": 64, "block_length": 32, "batch_size": 30}
    score = evaluate(lm, problems, "ar_guided", **options)
    assert score.nfe < 10
    assert 0 < score.guide_nfe <= score.nfe
    assert score.final >= 0.9


def test_a_model_under_a_folder_name_or_loaded_is_the_same_guide(tmp_path: Path) -> None:
    GUIDE.save_pretrained(tmp_path)
    lm = random_llada()
    one, other = (
        dllm.generate(lm, PROMPTS, ARGuided(g), gen_length=12, block_length=6) for g in (str(tmp_path), GUIDE)
    )
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.guide_nfe, other.guide_nfe)


class TestRefusals:
    def refused(self, policy: ARGuided, why: str, lm: Any = None) -> None:
        with pytest.raises(ValueError, match=why) as caught:
            dllm.generate(lm or random_llada(), [[3, 4]], policy, gen_length=4)
        assert "\n" not in str(caught.value)

    def test_no_such_model(self) -> None:
        self.refused(ARGuided("/no/such/folder"), "guide='/no/such/folder' is not a folder, .*known are tiny-guide")

    def test_a_model_that_is_not_causal(self, tmp_path: Path) -> None:
        save_folder(random_llada(), tmp_path)
        self.refused(ARGuided(str(tmp_path)), "is not a causal language model that can be loaded")

    def test_a_model_whose_cache_cannot_be_cropped(self) -> None:
        config = MistralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=4,
        )  # fmt: skip
        sliding = Qwen2Config(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=0,
        )  # fmt: skip
        for model in (MistralForCausalLM(config), Qwen2ForCausalLM(sliding)):
            self.refused(ARGuided(model), "cannot be cropped .*use a causal model with full attention")

    def test_another_number_of_tokens_without_a_tokenizer(self) -> None:
        self.refused(ARGuided(random_guide(vocab=70)), r"cannot be aligned: .*\(70 and 64 entries\)")

    def test_a_loaded_model_with_other_tokens_beside_the_models_tokenizer(self) -> None:
        lm = random_llada(tokenizer=True)
        self.refused(ARGuided(random_guide(vocab=70)), r"has 70 tokens and the model .*give dllm.guide.Guide\(", lm)

    def test_a_prompt_with_a_token_the_guide_does_not_have(self) -> None:
        lm = random_llada(tokenizer=True)
        lm.backbone.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
        guide = load_guide("tiny-guide", torch.device("cpu"))
        theirs = copy(guide.tokenizer)
        vocab = {token: number for token, number in guide.tokenizer.get_vocab().items() if token != "<|unk|>"}
        theirs.get_vocab = lambda: vocab  # type: ignore[method-assign,union-attr]
        unknown = lm.tokenizer.unk_token_id
        with pytest.raises(ValueError, match=f"does not have token {unknown} of a prompt; use "):
            dllm.generate(lm, [[5, unknown, 6]], ARGuided(Guide(guide.model, theirs)), gen_length=4)

    def test_what_is_no_guide(self) -> None:
        with pytest.raises(ValueError, match="guide=5 is not a guide; use "):
            replace(ARGuided(), guide=5)

    @pytest.mark.parametrize("options", [{"top_k": 3}, {"ratio": 0.5}, {"accept": "topk", "ratio": 0.5}])
    def test_an_option_without_effect(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"has no effect with accept=.*; use accept="):
            ARGuided(**options)

    def test_a_tokenizer_on_one_side_only(self) -> None:
        lm = random_llada(tokenizer=True)
        guide = Guide(random_guide(vocab=len(lm.tokenizer)), None)
        self.refused(ARGuided(guide), "without a tokenizer for both", lm)

    @pytest.mark.parametrize(
        ("name", "value"), [("accept", "all"), ("top_k", 0), ("ratio", 1.5), ("on_reject", "nothing")]
    )
    def test_values_out_of_range_are_named(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=rf"{name}=.*(use|expected) "):
            replace(ARGuided(accept="ratio"), **{name: value})


def test_a_guide_does_not_write_what_is_never_predicted() -> None:
    lm, question = dllm.load("tiny-llada", device="cpu"), "Tom has 23 apples. He buys 12. How many apples does he have?"
    options: dict[str, Any] = {"gen_length": 40, "stop_at_eos": False}
    for suppression, written in ((None, True), ("logits", False)):
        out = dllm.generate(lm, question, ARGuided(on_reject="guide"), eos_suppression=suppression, **options)
        assert (out.completions == 0).any() == written
