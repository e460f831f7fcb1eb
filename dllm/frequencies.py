"""How often each token of a vocabulary occurs in a corpus, for the policy `pc`.

Count any corpus with the tokenizer of the model, and store the table::

    from dllm.frequencies import count_tokens

    with open("corpus.txt") as corpus:
        count_tokens(corpus, lm.tokenizer).save("frequencies.json")

The table of the bundled models' tokenizer comes with the package.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.checks import first_line
from dllm.files import BUNDLED, check_readable, expanded, parse_json, write_json
from dllm.models.tokenizers import tokens_of
from dllm.stored import misfit

_FILE = "frequencies.json"
_AGAIN = "count the corpus again with dllm.frequencies.count_tokens"


@dataclass(frozen=True)
class Frequencies:
    """A table of token frequencies.

    Attributes:
        counts: occurrences of each token id (in decimal digits, as JSON has it); tokens without any are left out.
        vocabulary: identifies the tokenizer; None for a table of plain token ids, which fits any model they fit.
    """

    counts: dict[str, int]
    vocabulary: str | None = None

    def __post_init__(self) -> None:
        wrong = [id for id, count in self.counts.items() if not (id.isascii() and id.isdigit() and 0 < count < 2**53)]
        if wrong or not self.counts:
            what = f"token {wrong[0]!r} has the count {self.counts[wrong[0]]}" if wrong else "no token is counted"
            raise ValueError(what)

    def __hash__(self) -> int:
        """Policies with a table can be keys, like those without."""
        return hash((frozenset(self.counts.items()), self.vocabulary))

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        write_json(expanded(path), asdict(self))

    def fits(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> bool:
        """Whether the table was counted with a tokenizer.

        Args:
            tokenizer: of the model; without one only the ids tell.
            vocab_size: entries of its logits.
        """
        same = tokenizer is None or self.vocabulary in (None, vocabulary_of(tokenizer))
        return same and max(map(int, self.counts)) < vocab_size

    def shares(self, vocab_size: int) -> Float[Tensor, " V"]:
        """The share of each token in the corpus, in float64; of tokens that do not occur, that of a single one."""
        total = sum(self.counts.values())
        shares = torch.full((vocab_size,), 1 / total, dtype=torch.float64)
        ids = torch.tensor([int(id) for id in self.counts])
        shares[ids] = torch.tensor(list(self.counts.values()), dtype=torch.float64) / total
        return shares


def count_tokens(texts: Iterable[str | Sequence[int]], tokenizer: PreTrainedTokenizerBase | None = None) -> Frequencies:
    """Count the tokens of a corpus.

    Args:
        texts: texts, such as the lines of an open file, or rows of token ids.
        tokenizer: of the model; needed for texts, and marks the table as its own.

    Raises:
        ValueError: a text without a tokenizer, or no token at all.
    """
    counts: Counter[int] = Counter()
    for text in texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("tokenizer=None cannot read texts; give the model's, or rows of token ids")
            text = tokens_of(tokenizer, text, "a text")
        counts.update(map(int, text))
    table = {str(id): counts[id] for id in sorted(counts)}
    return Frequencies(table, None if tokenizer is None else vocabulary_of(tokenizer))


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What identifies a tokenizer: a digest of its tokens and their ids."""
    entries = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0])))
    return hashlib.sha256(entries.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_frequencies(path: str | Path, option: str = "table") -> Frequencies:
    """Read a stored table.

    Args:
        path: the file.
        option: what its path was given as, for errors.

    Raises:
        ValueError: the file cannot be read or is no table.
    """
    check_readable(option, expanded(path))
    try:
        content = parse_json(expanded(path).read_text(encoding="utf-8"), once=True)
        if wrong := misfit(content, Frequencies):
            raise ValueError(wrong)
        return Frequencies(**content)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option}={str(path)!r} is not a table of token frequencies ({first_line(error)}); {_AGAIN}"
        ) from None


def bundled_frequencies() -> list[Path]:
    """The tables that come with the package."""
    return sorted(BUNDLED.glob(f"*/{_FILE}"))
