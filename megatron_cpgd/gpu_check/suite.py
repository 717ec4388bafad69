"""tests/gpu, one check for each test."""

import re
from typing import Any

from megatron_cpgd.gpu_check.checks import Check, Emit, Figures, Setup

TESTS = "tests/gpu"


def run(setup: Setup, emit: Emit) -> None:
    """Each test that ends is reported at once."""
    try:
        import pytest
    except ImportError:
        emit(Check(name=TESTS, status="SKIP", reason="pytest is missing: install the extra `dev`"))
        return

    class Reporter:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or not report.passed:
                emit(_check(report))

    code = pytest.main([TESTS, "-m", "gpu", "-p", "no:cacheprovider"], plugins=[Reporter()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        emit(Check(name=TESTS, status="FAIL", reason=f"pytest ended with {code!r}"))


def _check(report: Any) -> Check:
    name = report.nodeid.rpartition("/")[2]
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return Check(name=name, status="SKIP", reason=reason.removeprefix("Skipped: "))
    printed = "; ".join(re.findall(r"\S.*", report.capstdout))
    figures: Figures = {"printed": printed} if printed else {}
    if report.passed:
        return Check(name=name, status="PASS", figures=figures)
    reason = str(report.longreprtext).strip().splitlines()[-1]
    return Check(name=name, status="FAIL", figures=figures, reason=f"{report.when}: {reason}")
