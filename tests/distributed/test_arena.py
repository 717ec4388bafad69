"""All ranks of a host map the one arena that rank 0 creates."""

import pytest

from tests.helpers.ranks import run_distributed
from tests.helpers.weight_jobs import arena_job

pytestmark = pytest.mark.distributed


def test_ranks_write_into_one_file_that_goes_away_at_the_end(tmp_path):
    results = run_distributed(2, arena_job, tmp_path)
    # Each rank writes rank + 1 into its row and reads both, then leaves the arena.
    assert [result["values"] for result in results] == [[1.0, 2.0], [1.0, 2.0]]
    assert [result["dtype"] for result in results] == ["bfloat16", "bfloat16"]
    assert len({result["path"] for result in results}) == 1
    assert [result["after_rank_1_left"] for result in results] == [True, True]
    assert list(tmp_path.iterdir()) == []
