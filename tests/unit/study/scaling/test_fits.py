"""Laws of scaling: numbers worked by hand, and laws that are recovered from their own points."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.study.scaling.fits import fit_amdahl, fit_power, fit_weak

GPUS = st.lists(st.sampled_from([8 * 2**i for i in range(10)]), min_size=3, unique=True)
SECONDS = st.floats(0.01, 1e4)


def test_two_points_fix_amdahl_without_an_interval():
    # t = a + b * 8 / n: a + b = 100 and a + b / 2 = 60 give b = 80, a = 20.
    law = fit_amdahl([(8, 100.0), (16, 60.0)])
    assert law and law.serial.value == pytest.approx(0.2) and law.seconds == pytest.approx(100)
    assert law.at(32) == pytest.approx(40)  # 20 + 80 / 4
    assert math.isnan(law.serial.low) and math.isnan(law.serial.high)


def test_the_interval_of_an_exponent_by_hand():
    # log2 t over log2 n: (0, 0), (1, -1), (2, -1). Slope -1/2 around the mean (1, -2/3); residuals
    # 1/6, -1/3, 1/6 with one degree of freedom: variance 1/6, that of the slope 1/6 / 2. Student's
    # t of one degree: 12.7062.
    law = fit_power([(1, 1.0), (2, 0.5), (4, 0.5)])
    half = 12.7062 * math.sqrt(1 / 12)
    assert law and law.exponent.value == pytest.approx(0.5)
    assert law.exponent.low == pytest.approx(0.5 - half, rel=1e-5)
    assert law.exponent.high == pytest.approx(0.5 + half, rel=1e-5)
    # The middle point is 2 ** (1/3) times the law's.
    assert law.worst == pytest.approx(2 ** (1 / 3) - 1)


def test_weak_scaling_by_hand():
    law = fit_weak([(8, 10.0), (16, 12.0), (32, 14.0)])
    assert law and (law.seconds, law.per_doubling.value) == pytest.approx((10, 2))
    assert law.at(64) == pytest.approx(16) and law.worst == pytest.approx(0, abs=1e-12)


@given(GPUS, SECONDS, st.floats(0.01, 0.99))
def test_amdahl_is_recovered(gpus, seconds, serial):
    first = min(gpus)
    law = fit_amdahl([(n, seconds * (serial + (1 - serial) * first / n)) for n in gpus])
    assert law and law.serial.value == pytest.approx(serial, rel=1e-6)
    assert law.serial.low <= law.serial.value <= law.serial.high
    assert law.serial.high - law.serial.low < 1e-5
    assert law.seconds == pytest.approx(seconds) and law.worst < 1e-9


@given(GPUS, SECONDS, st.floats(-1.0, 2.0))
def test_a_power_law_is_recovered(gpus, a, exponent):
    law = fit_power([(n, a * n**-exponent) for n in gpus])
    assert law and law.exponent.value == pytest.approx(exponent, abs=1e-9)
    assert law.exponent.high - law.exponent.low < 1e-5
    assert law.a == pytest.approx(a) and law.worst < 1e-9


@given(GPUS, SECONDS, st.floats(0.0, 1.0))
def test_weak_scaling_is_recovered(gpus, seconds, share):
    first = min(gpus)
    law = fit_weak([(n, seconds * (1 + share * math.log2(n / first))) for n in gpus])
    assert law and law.per_doubling.value == pytest.approx(share * seconds, abs=1e-9 * seconds)
    assert law.seconds == pytest.approx(seconds)


def test_the_intervals_hold_the_truth_about_19_times_of_20():
    noise = random.Random(0)
    held = {"amdahl": 0, "power": 0, "weak": 0}
    for _ in range(400):
        relative = [1 + noise.gauss(0, 0.02) for _ in range(6)]
        gpus = [8 * 2**i for i in range(6)]
        amdahl = fit_amdahl(
            [(n, (10 + 90 * 8 / n) * e) for n, e in zip(gpus, relative, strict=True)]
        )
        power = fit_power([(n, 100 * n**-0.8 * e) for n, e in zip(gpus, relative, strict=True)])
        weak = fit_weak(
            [(n, (10 + math.log2(n / 8)) * e) for n, e in zip(gpus, relative, strict=True)]
        )
        assert amdahl and power and weak
        held["amdahl"] += amdahl.serial.low <= 0.1 <= amdahl.serial.high
        held["power"] += power.exponent.low <= 0.8 <= power.exponent.high
        held["weak"] += weak.per_doubling.low <= 1 <= weak.per_doubling.high
    # 380 are expected; the standard deviation of a count is 4.4.
    assert all(365 <= count <= 395 for count in held.values()), held


@pytest.mark.parametrize("points", [[], [(8, 1.0)], [(8, 1.0), (8, 2.0)]])
def test_one_number_of_gpus_has_no_law(points):
    assert fit_amdahl(points) is fit_power(points) is fit_weak(points) is None
