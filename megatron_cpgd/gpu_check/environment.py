"""The findings of `megatron-cpgd doctor`."""

import os

from megatron_cpgd.doctor.examine import examine
from megatron_cpgd.gpu_check.checks import Check, Emit, Setup


def run(setup: Setup, emit: Emit) -> None:
    """A warning passes, with its text."""
    for finding in examine(None, (), os.environ):
        failed = finding.status == "FAIL"
        emit(
            Check(
                name=finding.check,
                status="FAIL" if failed else "PASS",
                figures={} if failed else {"found": finding.found},
                reason=f"{finding.found}; {finding.advice}" if failed else finding.advice,
            )
        )
