"""The certainty prior: prefer positions with decoded neighbours (d2Cache, arXiv 2509.23094).

Rule:

    commit j  if  p_j(top token) * d_j >= threshold,  and always the `at_least` best of these products

    d_j = sum_(decoded i) exp(-(i - j)^2 / (2 sigma^2)) / sum_(all i) exp(-(i - j)^2 / (2 sigma^2))

Per step, over the masked positions j of the block, with p_j the predicted distribution at j, and d_j the
Gaussian-weighted share of decoded positions i around j. As many positions as are generated count on either side: those
to the left are decoded, those to the right if the last generated one is. A small sigma decodes from the decoded text
on; a large one is the order of the confidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dllm.checks import number
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Policy, commit
from dllm.samplers.selection import top


@dataclass(frozen=True)
class Certainty(Policy):
    """Commit confident positions near decoded ones.

    Args:
        sigma: standard deviation of the Gaussian, in positions.
        threshold: minimum product of confidence and density of a committed token; above 1 no token qualifies.
        at_least: tokens committed per step whatever their score.

    Raises:
        ValueError: a number out of range.
    """

    single_forward = True

    sigma: float = 10.0
    threshold: float = 2.0
    at_least: int = 1

    def __post_init__(self) -> None:
        number("sigma", self.sigma, "a number of positions from 0.1 to 1000 (10 is published)", low=0.1, high=1000)
        number("threshold", self.threshold, "0 or more; above 1 no token qualifies", low=0)
        number("at_least", self.at_least, "a whole number of at least 1", low=1, whole=True)

    def start(self, setup: Setup) -> int:
        """The id of [MASK]."""
        return setup.mask_token_id

    def step(self, window: Window, denoise: Denoise, state: int) -> Edit:
        """Commit what is confident and near decoded positions, and always the best."""
        prediction = denoise()
        score = prediction.confidence * self._density(window, state).gather(1, window.columns)
        score = score.masked_fill(~window.masked, -torch.inf)
        return commit(window, prediction, (score >= self.threshold) | top(score, self.at_least, window.masked))

    def _density(self, window: Window, mask_token_id: int) -> Float[Tensor, "B L"]:
        """The weighted share of decoded positions around each column."""
        length, reach = window.tokens.shape[1], ceil(6 * self.sigma)  # beyond, weights are below 1e-7
        column = torch.arange(-reach, length + reach, device=window.tokens.device)
        start, end = window.start[:, None], (window.start + window.span)[:, None]
        decoded = F.pad(window.tokens != mask_token_id, (reach, reach))
        last = decoded.gather(1, end - 1 + reach)
        decoded = torch.where(column < end, decoded, last)
        decoded = (decoded | (column < start)) & (column >= start - window.span[:, None])
        decoded = decoded & (column < end + window.span[:, None])
        offset = torch.arange(-reach, reach + 1, device=column.device).double()
        kernel = (-offset.square() / (2 * self.sigma**2)).exp()
        return F.conv1d(decoded.double()[:, None], (kernel / kernel.sum())[None, None])[:, 0]
