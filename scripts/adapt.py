"""`dllm adapt`: turn a causal model into a block-diffusion model, trained on the word problems.

Weights of a Qwen2 model under the names of SDAR (arXiv 2510.06303), which has no biases, but norms of queries and keys,
and attends within a block in both directions. Trained as a block-diffusion model (BD3-LM, arXiv 2503.09573, section 3):
a forward over two copies of a text, where

    clean block b attends to clean blocks <= b
    noisy block b attends to clean blocks < b and to noisy block b

gives the predictions of all blocks at once, each as in decoding: blocks before it clean, nothing after it. In a block
of n answer tokens a uniform number m of 1 to n is masked, and the loss is averaged over these m, then over the blocks:
the negative log-likelihood of a random order within the block.
"""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from dllm.checks import number
from dllm.models.loading import checkpoint_folder, find_device
from dllm.scripts import app, training
from dllm.scripts.tiny_models import as_block_diffusion
from dllm.scripts.train_tiny import OnWordProblems, carry_out, check_data
from dllm.scripts.training import Trainer

RECIPE = "adapt.yaml"


def two_copies(
    blocks: Int[Tensor, "B L"], valid: Bool[Tensor, "B L"], first: int
) -> Bool[Tensor, "B 1 2L-first 2L-first"]:
    """The attention mask of a clean copy followed by a noisy copy of the positions from `first` on.

    Args:
        blocks: number of each position's block.
        valid: where a position is not padding.
        first: first position of the noisy copy.
    """
    length = blocks.shape[1]
    block, real = torch.cat((blocks, blocks[:, first:]), dim=1), torch.cat((valid, valid[:, first:]), dim=1)
    noisy = torch.arange(block.shape[1], device=blocks.device) >= length
    query, key = block[:, :, None], block[:, None, :]
    clean = ~noisy & (key < query + ~noisy[:, None])
    within = noisy & noisy[:, None] & (key == query)
    itself = torch.eye(len(noisy), dtype=torch.bool, device=blocks.device)  # a query without keys would give NaN
    return (((clean | within) & real[:, None, :]) | itself)[:, None]


def mask_blocks(
    starts: Int[Tensor, " B"], width: int, block_length: int, rng: torch.Generator
) -> tuple[Bool[Tensor, "B C"], Float[Tensor, "B C"]]:
    """Draw the masked positions of an answer's blocks.

    Args:
        starts: position of the answer's first token, counted from the row's first.
        width: length C of the answer.
        block_length: positions of a block, counted from the row's first.
        rng: source of randomness.

    Returns:
        Which positions are masked, and the weight of each one's loss; the weights of a block sum to 1.
    """
    rows, offset = len(starts), starts % block_length
    blocks = (width + 2 * block_length - 2) // block_length  # of the longest offset
    slots = offset[:, None] + torch.arange(width)
    draw = torch.full((rows, blocks * block_length), torch.inf)
    draw.scatter_(1, slots, torch.rand((rows, width), generator=rng))
    draw = draw.unflatten(1, (blocks, block_length))
    size = draw.isfinite().sum(-1)
    count = (torch.rand((rows, blocks), generator=rng) * size).floor().long() + 1
    masked = (draw.argsort(-1).argsort(-1) < count[..., None]) & draw.isfinite()
    weight = masked / count[..., None]
    return masked.flatten(1).gather(1, slots), weight.flatten(1).gather(1, slots)


class BlockDiffusion(OnWordProblems):
    """Training data and loss."""

    def _build(self) -> PreTrainedModel:
        return as_block_diffusion(self._start(), self.cfg.init, self.tokenizer, self.cfg.block_length)

    def _start(self) -> Path:
        return checkpoint_folder(self.cfg.init, option="init", known=("tiny-guide",))

    def _loss(self, ids: Tensor, valid: Tensor, masked: Tensor, weight: Tensor) -> Tensor:
        width, block_length = self.cfg.prompt_length, self.cfg.block_length
        first = max(0, width - block_length + 1)  # an answer's first block may begin in the prompt
        positions = (valid.cumsum(-1) - 1).clamp(min=0)
        noisy = ids[:, width:].masked_fill(masked, self.tokenizer.mask_token_id)
        both = torch.cat((ids, ids[:, first:width], noisy), dim=1)
        mask = two_copies(positions // block_length, valid.bool(), first)
        with training.autocast(self.cfg.autocast, torch.device(self.cfg.device).type):
            places = torch.cat((positions, positions[:, first:]), dim=1)
            logits = self.model(input_ids=both, attention_mask=mask, position_ids=places).logits
        logits, canvas = logits[:, -noisy.shape[1] :].float(), ids[:, width:]
        losses = F.cross_entropy(logits.transpose(1, 2), canvas, reduction="none")
        return (losses * weight).sum() / weight.sum()

    def loss(self) -> Tensor:
        """The loss of the next batch."""
        batch, width = self.batches(), self.cfg.prompt_length
        starts = batch.valid[:, :width].sum(-1)
        masked, weight = mask_blocks(starts, batch.ids.shape[1] - width, self.cfg.block_length, self.rng)
        return self.compute_loss(*(t.to(self.cfg.device) for t in (batch.ids, batch.valid, masked, weight)))


def main() -> None:
    """Entry point."""
    app.run(adapt, "adapt", {"publish": str | None, "autocast": str | None, "threads": int | None})


def adapt(cfg: DictConfig) -> None:
    """Train for `steps` with checkpoints; then evaluate, write the model card and publish."""
    _check(cfg)
    logging.disable_progress_bar()  # transformers draws one for each small file
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    carry_out(cfg, trainer_of(cfg), RECIPE, "adapting", "block")


def trainer_of(cfg: DictConfig) -> Trainer:
    """The training, from its start."""
    blocks = BlockDiffusion(cfg)
    return Trainer(cfg, blocks, training.muon_and_adamw(blocks.model, cfg.matrix_lr, cfg.rest_lr), RECIPE)


def _check(cfg: DictConfig) -> None:
    check_data(cfg)
    training.check(cfg, ("matrix_lr", "rest_lr"))
    number("block_length", cfg.block_length, "a whole number from 1 to 512", low=1, high=512, whole=True)
    find_device(cfg.device)
    training.check_folders(cfg, RECIPE)
