"""Training data of the bundled models: random problems, and two masking schemes.

The denoisers are trained on LLaDA masks (a uniform number of masked tokens, arXiv 2502.09992, with the loss
averaged over them), and on windows as in decoding: everything before is clean, everything after is [MASK].
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dllm.tasks import word_problems


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts and canvases of one length.

    Attributes:
        ids: (B, P + C) clean tokens, with the canvas padded by end-of-text.
        valid: (B, P + C) attention mask.
        answer_lengths: (B,) tokens of each answer, without end-of-text.
    """

    ids: Tensor
    valid: Tensor
    answer_lengths: Tensor


class BatchMaker:
    """Samples batches of new problems; its state is a `random.Random`."""

    def __init__(self, cfg: DictConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        self.rng = random.Random(cfg.seed)

    def __call__(self) -> Batch:
        """Draw the next batch."""
        cfg = self.cfg
        canvas = self.rng.choices(list(cfg.canvas_lengths), list(cfg.canvas_lengths.values()))[0]
        counts = self.rng.choices((1, 2, 3), cfg.step_weights, k=cfg.batch_size)
        drawn = [word_problems.sample_problem(self.rng, n) for n in counts]
        questions = self.tokenizer([p.question for p in drawn]).input_ids
        answers = self.tokenizer([p.solution for p in drawn]).input_ids
        eos, width = self.tokenizer.eos_token_id, cfg.prompt_length
        for name, room, rows in (("prompt_length", width, questions), ("canvas_lengths", canvas, answers)):
            if (longest := max(map(len, rows))) > room:
                raise ValueError(f"{name}={room} is out of range; a text has {longest} tokens, increase it")
        pairs = zip(questions, answers, strict=True)
        rows = [[eos] * (width - len(q)) + q + a + [eos] * (canvas - len(a)) for q, a in pairs]
        valid = [[0] * (width - len(q)) + [1] * (len(q) + canvas) for q in questions]
        return Batch(torch.tensor(rows), torch.tensor(valid), torch.tensor([len(a) for a in answers]))


def corrupt(
    canvas: Tensor, answer_lengths: Tensor, noise: DictConfig, tokenizer: PreTrainedTokenizerFast, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample the masked positions and the targets of the loss.

    Args:
        canvas: (B, C) clean tokens.
        answer_lengths: (B,) tokens before the end-of-text padding.
        noise: the `noise` node of the config.
        tokenizer: for the ids of digits and "=".
        rng: source of randomness.

    Returns:
        `masked` (B, C) and `target` (B, C), both bool; the loss is taken at `target`, part of `masked`.
    """
    rows, width = canvas.shape
    column = torch.arange(width)
    vocabulary = tokenizer.get_vocab()

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng)

    # Windows: start after an "=", at a multiple of 16, or anywhere in the answer; width log-uniform.
    equals = (canvas == vocabulary[" ="]).float() + 1e-6 * (column == 0)
    start = (answer_lengths + 4).clamp(max=width - 1) * uniform(rows)
    kind = uniform(rows)
    aligned = kind < (1 - noise.after_equals) / 2
    start = torch.where(aligned, start // 16 * 16, start).long()
    length = (2 * (noise.max_window / 2) ** uniform(rows)).round().long()
    length = torch.where(aligned & (uniform(rows) < 0.7), noise.max_window, length)
    after = torch.multinomial(equals, 1, generator=rng)[:, 0] + 1
    start = torch.where(kind > 1 - noise.after_equals, after, start)
    in_window = (column >= start[:, None]) & (column < (start + length)[:, None])
    # Within it everything, or digits and other tokens at separate rates: decoding commits words first.
    digits = torch.tensor([t.strip().isdigit() for t in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    rate = torch.where(digits[canvas], uniform(rows, 1), uniform(rows, 1))
    rate = torch.where(uniform(rows, 1) < noise.full, 1.0, rate)
    target = in_window & (uniform(rows, width) < rate)
    windows = target | (column >= (start + length)[:, None])
    # Plain masks: a uniform number of them, stratified over the batch.
    share = (torch.randperm(rows, generator=rng) + uniform(rows)) / rows
    count = (share * width).floor() + 1
    plain = uniform(rows, width).argsort(-1).argsort(-1) < count[:, None]

    use_window = uniform(rows, 1) < noise.window
    return torch.where(use_window, windows, plain), torch.where(use_window, target, plain)
