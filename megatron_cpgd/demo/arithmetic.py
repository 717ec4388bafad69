"""Sums and differences of two-digit numbers, and a tutor who seldom works them out correctly.

A response first adds (or subtracts) the tens and the units, then puts both together:
`37+58=` -> `80+15=95`, `62-37=` -> `30-5=25`. The tutor has two bad habits, both well known from
school: the carry is forgotten (`80+15=85`), and the smaller digit is taken from the larger one
whichever comes first (`30+5=35`). Now and then a digit also slips.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Problem:
    """`left op right` with both numbers in 10..99 and a result that is not negative."""

    left: int
    op: str
    """`+` or `-`."""
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left}{self.op}{self.right}="

    @property
    def tens(self) -> int:
        """Sum or difference of the tens, in units of one."""
        return (self.left // 10 + self._sign * (self.right // 10)) * 10

    @property
    def units(self) -> int:
        """Sum or difference of the last digits; over 9 or negative if `is_hard`."""
        return self.left % 10 + self._sign * (self.right % 10)

    @property
    def answer(self) -> int:
        return self.tens + self.units

    @property
    def is_hard(self) -> bool:
        """Needs a carry or a borrow."""
        return not 0 <= self.units <= 9

    @property
    def _sign(self) -> int:
        return 1 if self.op == "+" else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """Two sets without a common problem; `a+b` and `b+a` are on the same side."""

    train: list[Problem]
    """For the warm-up and for reinforcement learning."""
    heldout: list[Problem]
    """For evaluation only."""


def split_problems(rng: random.Random, *, train: int, heldout: int, hard_share: float) -> Problems:
    """Draw distinct problems; `hard_share` of each set needs a carry or a borrow."""
    additions = [Problem(left=a, op="+", right=b) for a in range(10, 100) for b in range(10, a + 1)]
    subtractions = [Problem(left=p.left, op="-", right=p.right) for p in additions]
    pool = [_swap_sometimes(p, rng) for p in additions + subtractions]
    rng.shuffle(pool)
    hard, easy = [p for p in pool if p.is_hard], [p for p in pool if not p.is_hard]

    def take(count: int) -> list[Problem]:
        hard_count = round(count * hard_share)
        taken = [hard.pop() for _ in range(hard_count)]
        taken += [easy.pop() for _ in range(count - hard_count)]
        rng.shuffle(taken)
        return taken

    return Problems(heldout=take(heldout), train=take(train))


def solve(problem: Problem) -> str:
    """The correct response."""
    return _write(problem.tens, problem.units)


def tutor_response(
    problem: Problem, rng: random.Random, *, habit_rate: float, slip_rate: float
) -> str:
    """A worked example as the tutor gives it: correct, spoilt by the habit, or with a slip.

    Args:
        habit_rate: probability of the bad habit, which only hurts hard problems.
        slip_rate: probability that the tens or the units come out one too high.
    """
    tens, units = problem.tens, problem.units
    if rng.random() < slip_rate:
        tens, units = rng.choice([(tens + 10, units), (tens, units + 1)])
    if rng.random() >= habit_rate:
        return _write(tens, units)
    if problem.op == "+":
        return f"{tens}{units:+d}={tens + units % 10}"
    return _write(tens, abs(units))


def _write(tens: int, units: int) -> str:
    return f"{tens}{units:+d}={tens + units}"


def _swap_sometimes(problem: Problem, rng: random.Random) -> Problem:
    """`a+b` or `b+a`; a difference keeps its order."""
    if problem.op == "-" or rng.random() < 0.5:
        return problem
    return Problem(left=problem.right, op="+", right=problem.left)
