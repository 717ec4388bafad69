"""Problems, their solutions and the tutor's mistakes."""

import random

import pytest

from megatron_cpgd.demo.arithmetic import Problem, solve, split_problems, tutor_response


def problem(text: str) -> Problem:
    left, op, right = text[:2], text[2], text[3:5]
    return Problem(left=int(left), op=op, right=int(right))


def tutor(text: str, *, habit_rate: float, slip_rate: float = 0.0, seed: int = 0) -> str:
    rng = random.Random(seed)
    return tutor_response(problem(text), rng, habit_rate=habit_rate, slip_rate=slip_rate)


@pytest.mark.parametrize(
    ("text", "solution"),
    [
        ("37+58", "80+15=95"),
        ("32+45", "70+7=77"),
        ("98+75", "160+13=173"),
        ("62-37", "30-5=25"),
        ("68-35", "30+3=33"),
        ("62-57", "10-5=5"),
        ("40-40", "0+0=0"),
    ],
)
def test_solution_puts_tens_and_units_together(text, solution):
    assert solve(problem(text)) == solution
    assert solution.rpartition("=")[2] == str(problem(text).answer)
    assert tutor(text, habit_rate=0.0) == solution


def test_habit_forgets_the_carry_and_takes_the_smaller_digit_from_the_larger():
    assert tutor("37+58", habit_rate=1.0) == "80+15=85"
    assert tutor("62-37", habit_rate=1.0) == "30+5=35"


@pytest.mark.parametrize("text", ["32+45", "68-35", "40-40"])
def test_habit_is_harmless_without_carry_or_borrow(text):
    assert not problem(text).is_hard
    assert tutor(text, habit_rate=1.0) == solve(problem(text))


def test_slip_makes_the_tens_or_the_units_one_too_high():
    slips = {tutor("37+58", habit_rate=0.0, slip_rate=1.0, seed=seed) for seed in range(20)}
    assert slips == {"90+15=105", "80+16=96"}


def test_tutor_is_right_on_a_hard_problem_as_often_as_the_rates_say():
    rng = random.Random(0)
    responses = [
        tutor_response(problem("37+58"), rng, habit_rate=0.75, slip_rate=0.1) for _ in range(4000)
    ]
    # (1 - 0.75) * (1 - 0.1) = 0.225; one standard deviation of the mean is 0.0066
    assert responses.count("80+15=95") / 4000 == pytest.approx(0.225, abs=0.03)


def test_heldout_and_training_problems_are_disjoint_also_with_swapped_summands():
    problems = split_problems(random.Random(0), train=4096, heldout=256, hard_share=0.75)
    keys = {
        name: {(p.op, frozenset((p.left, p.right))) for p in part}
        for name, part in (("train", problems.train), ("heldout", problems.heldout))
    }
    assert len(keys["train"]) == 4096 and len(keys["heldout"]) == 256  # no problem occurs twice
    assert not keys["train"] & keys["heldout"]


def test_split_has_the_share_of_hard_problems_and_only_two_digit_numbers():
    problems = split_problems(random.Random(1), train=400, heldout=40, hard_share=0.75)
    assert sum(p.is_hard for p in problems.train) == 300
    assert sum(p.is_hard for p in problems.heldout) == 30
    for p in problems.train + problems.heldout:
        assert 10 <= p.left <= 99 and 10 <= p.right <= 99 and p.answer >= 0
