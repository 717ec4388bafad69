"""`run_distributed` itself: what a test sees of a rank that fails."""

import time

import pytest
import torch.distributed as dist

from tests.helpers.rank_jobs import fail_job
from tests.helpers.ranks import run_distributed

pytestmark = pytest.mark.distributed


def test_results_come_back_by_rank():
    assert run_distributed(2, dist.get_rank) == [0, 1]


def test_a_rank_that_fails_alone_ends_the_job_at_once_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)^rank 2: Traceback .*ValueError: on purpose"):
        run_distributed(3, fail_job, 2, "raises", timeout_s=60)
    assert time.monotonic() - start < 30, "it waited for the ranks that wait for rank 2"


def test_a_rank_that_dies_is_named():
    with pytest.raises(RuntimeError, match="rank 2: died"):
        run_distributed(3, fail_job, 2, "dies", timeout_s=60)
