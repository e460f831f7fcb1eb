"""The bundled task: problems that add up, in every phrasing and style, and fair grades."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from dllm.tasks.word_problems import (
    GAINS,
    LOSSES,
    OBJECTS,
    PEOPLE,
    Grade,
    Problem,
    grade,
    problems,
    sample_problem,
)

MANY = problems(2000, seed=1_000_001)
OPENINGS = {"start": "Start with ", "first": "First, ", "compute": "We compute "}


def clause(template: str) -> re.Pattern[str]:
    return re.compile(template.format(r"\d+"))


class TestProblems:
    def test_every_chain_adds_up_within_0_to_99(self) -> None:
        for problem in MANY:
            for step in problem.steps:
                assert step.op in ("+", "-")
                assert step.result == (step.left + step.right if step.op == "+" else step.left - step.right)
                assert step.right > 0
                assert all(0 <= value <= 99 for value in (step.left, step.right, step.result))
            assert all(before.result == after.left for before, after in pairwise(problem.steps))
            assert problem.answer == problem.steps[-1].result

    def test_the_question_states_every_number_in_order(self) -> None:
        for problem in MANY:
            stated = [int(number) for number in re.findall(r"\d+", problem.question)]
            assert stated == [problem.steps[0].left, *(step.right for step in problem.steps)]

    def test_the_question_tells_gains_from_losses(self) -> None:
        verbs = {verb.split()[0]: op for op, group in (("+", GAINS), ("-", LOSSES)) for verb in group}
        for problem in MANY:
            told = [verbs[word] for word in re.findall(r"[a-z]+", problem.question) if word in verbs]
            assert told == [step.op for step in problem.steps]

    def test_two_and_three_operations_are_about_equally_common(self) -> None:
        three = sum(len(problem.steps) == 3 for problem in MANY)
        assert {len(problem.steps) for problem in MANY} == {2, 3}
        assert 900 < three < 1100

    def test_every_name_thing_phrasing_and_joint_occurs(self) -> None:
        text = "\n".join(problem.question for problem in MANY)
        for word in (*PEOPLE, *OBJECTS):
            assert re.search(rf"\b{word}\b", text), word
        for template in (*GAINS, *LOSSES):
            assert clause(template).search(text), template
        for joint in (", then ", " Then he ", " Then she ", ". He ", ". She "):
            assert joint in text

    def test_pronouns_fit_the_names(self) -> None:
        for problem in MANY:
            name = problem.question.split()[0]
            other = {"he": "she", "she": "he"}[PEOPLE[name]]
            assert not re.search(rf"\b{other}\b", problem.question + problem.solution, re.IGNORECASE)

    def test_a_seed_always_gives_the_same_problems(self) -> None:
        assert problems(50, seed=7) == problems(60, seed=7)[:50]
        assert problems(50, seed=7) == problems(100, seed=7)[:50]
        assert problems(50, seed=7) != problems(50, seed=8)

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_the_number_of_operations_can_be_chosen(self, count: int) -> None:
        rng = random.Random(0)
        for problem in (sample_problem(rng, count) for _ in range(100)):
            assert len(problem.steps) == count
            assert grade(problem.solution, problem) == Grade(final=True, chain=True)


class TestSolutions:
    def test_the_three_styles_are_about_equally_common(self) -> None:
        for opening in OPENINGS.values():
            assert 560 < sum(problem.solution.startswith(opening) for problem in MANY) < 780
        assert all(problem.solution.startswith(tuple(OPENINGS.values())) for problem in MANY)

    def test_every_solution_gets_full_marks(self) -> None:
        assert all(grade(problem.solution, problem) == Grade(final=True, chain=True) for problem in MANY)


@pytest.fixture
def problem() -> Problem:
    """Two steps, with two digits in every result."""
    return next(p for p in MANY if len(p.steps) == 2 and min(step.result for step in p.steps) > 10)


class TestGrading:
    def test_a_wrong_step_costs_the_chain_only(self, problem: Problem) -> None:
        step = problem.steps[0]
        text = problem.solution.replace(str(step), f"{step.left} {step.op} {step.right} = {step.result - 1}")
        assert grade(text, problem) == Grade(final=True, chain=False)

    def test_steps_out_of_order_cost_the_chain(self, problem: Problem) -> None:
        first, second = map(str, problem.steps)
        assert grade(f"{second}. {first}. The answer is {problem.answer}.", problem) == Grade(final=True, chain=False)

    def test_a_missing_or_surplus_step_costs_the_chain(self, problem: Problem) -> None:
        first, second = map(str, problem.steps)
        answer = f"The answer is {problem.answer}."
        assert grade(f"{second}. {answer}", problem) == Grade(final=True, chain=False)
        assert grade(f"{first}. {second}. {second}. {answer}", problem) == Grade(final=True, chain=False)

    def test_a_wrong_answer_earns_nothing_for_a_right_chain(self, problem: Problem) -> None:
        text = problem.solution.replace(f"answer is {problem.answer}", f"answer is {problem.answer + 1}")
        assert grade(text, problem) == Grade(final=False, chain=False)

    def test_text_cut_off_before_the_answer_is_wrong(self, problem: Problem) -> None:
        body = problem.solution.partition(" The answer")[0]
        for end in ("", " The answer", " The answer is", f" The answer is {str(problem.answer)[0]}"):
            assert grade(body + end, problem) == Grade(final=False, chain=False)

    def test_text_cut_off_behind_the_answer_is_right(self, problem: Problem) -> None:
        assert grade(problem.solution.removesuffix("."), problem) == Grade(final=True, chain=True)

    def test_contradicting_oneself_is_wrong_in_either_order(self, problem: Problem) -> None:
        right, wrong = f" The answer is {problem.answer}.", f" The answer is {problem.answer - 1}."
        body = problem.solution.partition(" The answer")[0]
        assert not grade(body + right + wrong, problem).final
        assert not grade(body + wrong + right, problem).final

    def test_repeating_oneself_is_right(self, problem: Problem) -> None:
        twice = f"{problem.solution} The answer is {problem.answer}."
        assert grade(twice, problem) == Grade(final=True, chain=True)

    @pytest.mark.parametrize("text", ["", "The answer is.", "answer", "45", "The answer is x."])
    def test_saying_nothing_is_wrong(self, problem: Problem, text: str) -> None:
        assert grade(text, problem) == Grade(final=False, chain=False)
