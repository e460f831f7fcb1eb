"""The bundled task: multi-step word problems with several correct ways to write the answer.

A problem is two or three additions and subtractions over 0..99, in varied phrasings. Each
answer is written in one of three styles chosen at random, so its tokens depend on each other: the
first words fix the style, every result is the next equation's operand, and the digits of a number
must agree. Unmasking too many tokens at once therefore shows up as wrong answers.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from dllm.checks import number

PEOPLE = {
    "Sam": "he", "Tom": "he", "Ben": "he", "Max": "he", "Leo": "he", "Jack": "he",
    "Ann": "she", "Eva": "she", "Mia": "she", "Zoe": "she", "Lily": "she", "Kate": "she",
}  # fmt: skip
OBJECTS = ("apples", "pens", "coins", "books", "cards", "stamps", "shells", "marbles", "eggs", "balls")
GAINS = ("buys {}", "finds {}", "gets {} more", "wins {}")
LOSSES = ("loses {}", "sells {}", "gives away {}", "uses {}")
STYLES = ("start", "first", "compute")

_MOST_PROBLEMS = 100_000
_EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
_ANSWER = re.compile(r"answer is (\d+)")


@dataclass(frozen=True)
class ChainStep:
    """One operation: ``left op right = result``, all values in 0..99."""

    left: int
    op: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


@dataclass(frozen=True)
class Problem:
    """A question, its chain of operations, and one way (of three) to write the solution."""

    question: str
    steps: tuple[ChainStep, ...]
    solution: str

    @property
    def answer(self) -> int:
        """The final result."""
        return self.steps[-1].result


@dataclass(frozen=True)
class Grade:
    """``final``: the stated answer is right. ``chain``: so is every equation, in order."""

    final: bool
    chain: bool


def sample_problem(rng: random.Random, n_steps: int | None = None) -> Problem:
    """Draw one problem.

    Args:
        rng: the only source of randomness.
        n_steps: number of operations; two or three at random when None.
    """
    name, pronoun = rng.choice(list(PEOPLE.items()))
    thing = rng.choice(OBJECTS)
    steps = _sample_steps(rng, n_steps or rng.choice((2, 3)))
    return Problem(_question(rng, name, pronoun, thing, steps), steps, _solution(rng, pronoun, thing, steps))


def check_count(name: str, value: int, least: int = 1) -> None:
    """Reject an excessive number of problems: all of them are generated at once.

    Raises:
        ValueError: it is out of range.
    """
    number(name, value, f"{least} to {_MOST_PROBLEMS}", low=least, high=_MOST_PROBLEMS, whole=True)


def problems(n: int, seed: int) -> list[Problem]:
    """The ``n`` problems of a seed. Training uses seeds below 1,000,000, evaluation those above."""
    rng = random.Random(seed)
    return [sample_problem(rng) for _ in range(n)]


def grade(text: str, problem: Problem) -> Grade:
    """Grade a written answer by its final number and by its whole chain of equations.

    An answer that is stated more than once must be correct each time.
    """
    stated = {int(number) for number in _ANSWER.findall(text)}
    final = stated == {problem.answer}
    written = [" ".join(match[:3]) + " = " + match[3] for match in _EQUATION.findall(text)]
    return Grade(final, final and written == [str(step) for step in problem.steps])


def _sample_steps(rng: random.Random, n_steps: int) -> tuple[ChainStep, ...]:
    value = rng.randint(5, 95)
    steps = []
    for _ in range(n_steps):
        # Both operations stay possible and no operand is zero.
        gain = value < 2 or (value < 98 and rng.random() < 0.5)
        right = rng.randint(1, 99 - value) if gain else rng.randint(1, value)
        result = value + right if gain else value - right
        steps.append(ChainStep(value, "+" if gain else "-", right, result))
        value = result
    return tuple(steps)


def _question(rng: random.Random, name: str, pronoun: str, thing: str, steps: tuple[ChainStep, ...]) -> str:
    text = f"{name} has {steps[0].left} {thing}."
    joined = False
    for i, step in enumerate(steps):
        clause = rng.choice(GAINS if step.op == "+" else LOSSES).format(step.right)
        if joined:
            text += f", then {clause}"
        elif i > 0 and rng.random() < 0.5:
            text += f" Then {pronoun} {clause}"
        else:
            text += f" {pronoun.capitalize()} {clause}"
        joined = i + 1 < len(steps) and rng.random() < 0.3
        if not joined:
            text += "."
    return f"{text} How many {thing} does {pronoun} have?"


def _solution(rng: random.Random, pronoun: str, thing: str, steps: tuple[ChainStep, ...]) -> str:
    style = rng.choice(STYLES)
    answer = steps[-1].result
    if style == "start":
        words = {"+": "Add", "-": "Subtract"}
        body = "".join(f" {words[step.op]} {step.right}: {step}." for step in steps)
        return f"Start with {steps[0].left}.{body} The answer is {answer}."
    if style == "first":
        leads = ["First", *["Next"] * (len(steps) - 2), "Finally"]
        body = " ".join(f"{lead}, {step}." for lead, step in zip(leads, steps, strict=False))
        return f"{body} So {pronoun} has {answer} {thing}. The answer is {answer}."
    return f"We compute {' and then '.join(map(str, steps))}. The answer is {answer}."
