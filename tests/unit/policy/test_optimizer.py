"""The learning rate of every step by hand, and which parameters decay."""

import pytest

import megatron_cpgd.policy  # noqa: F401  before anything imports megatron
from megatron_cpgd.config.schema import OptimConfig
from megatron_cpgd.policy.optimizer import learning_rate


def rates(total: int, **settings) -> list[float]:
    optim = OptimConfig(**settings)
    return [learning_rate(optim, step, total) for step in range(total)]


def test_a_constant_rate_stays():
    assert rates(4, lr=0.5) == [0.5] * 4


# 4 steps of warm-up: 1/4, 2/4, 3/4, 4/4; then the constant.
def test_warm_up_rises_in_equal_parts_and_never_starts_at_zero():
    assert rates(6, lr=0.8, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


# 4 steps after warm-up, from 1.0 towards 0.2: progress 0, 1/4, 2/4, 3/4 of a way of 0.8.
def test_a_linear_decay_loses_the_same_at_each_step():
    expected = [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]
    settings = {"lr": 1.0, "min_lr": 0.2, "schedule": "linear", "warmup_steps": 2}
    assert rates(6, **settings) == pytest.approx(expected)


# cos(0) = 1, cos(pi/4) = 0.70711, cos(pi/2) = 0, cos(3 pi/4) = -0.70711: (1 + cos) / 2 of the way.
def test_a_cosine_decay_is_half_way_in_the_middle():
    expected = [1.0, 0.8535534, 0.5, 0.1464466]
    assert rates(4, lr=1.0, schedule="cosine") == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_ends_at_min_lr_and_stays_there(schedule):
    optim = OptimConfig(lr=1.0, min_lr=0.25, schedule=schedule, warmup_steps=3)
    assert [learning_rate(optim, step, 10) for step in (10, 11, 1000)] == pytest.approx([0.25] * 3)


# A run that is resumed with fewer steps than its warm-up has must not divide by zero.
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_shorter_than_its_warm_up_only_warms_up(schedule):
    settings = {"lr": 1.0, "schedule": schedule, "warmup_steps": 4}
    assert rates(3, **settings) == pytest.approx([0.25, 0.5, 0.75])
    assert learning_rate(OptimConfig(**settings), 4, 3) == 1.0
