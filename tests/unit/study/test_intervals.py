"""Intervals against numbers worked by hand."""

import math

import pytest

from megatron_cpgd.study.intervals import mean_interval, rate_interval


def test_a_mean_has_students_interval():
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # s = sqrt(2.5), t(0.975, 4) = 2.7764: 2.7764 * 1.58114 / sqrt(5) = 1.9632
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (3, 1.0368, 4.9632), abs=1e-4
    )


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (21, 2.0860), (31, 2.0423), (121, 1.9799)])
def test_the_quantile_is_that_of_the_table_and_beyond(n, t):
    values = [0.0] * (n - 1) + [1.0]  # mean 1/n, variance 1/n: half width t / n
    assert mean_interval(values).high - 1 / n == pytest.approx(t / n, rel=1e-4)


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert math.isnan(mean_interval([0.5]).low) and mean_interval([0.5]).value == 0.5
    assert math.isnan(mean_interval([]).value)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 5, 0.0, 0.43448),  # z^2 / (n + z^2) = 3.84146 / 8.84146
        (5, 5, 0.56552, 1.0),
        # centre (0.2 + 0.384146) / 1.768292 = 0.33034; half 1.95996 / 1.768292
        # * sqrt(0.16 / 5 + 3.84146 / 100) = 1.10840 * 0.265355 = 0.29412
        (1, 5, 0.03622, 0.62446),
    ],
)
def test_a_rate_has_wilsons_interval(hits, n, low, high):
    interval = rate_interval(hits, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=2e-5)
    assert interval.value == hits / n
