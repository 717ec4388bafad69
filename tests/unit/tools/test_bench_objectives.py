"""tools/bench_objectives.py compares two implementations of one thing."""

import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from megatron_cpgd.errors import UserError
from tests.helpers.bench_jobs import TOOL, both_sides_job, load_tool, make_case
from tests.helpers.ranks import run_distributed


@pytest.fixture
def bench() -> ModuleType:
    return load_tool()


@pytest.mark.distributed
@pytest.mark.parametrize("objective", ["cpgd", "grpo", "gspo", "vespo"])
def test_both_sides_have_one_loss_and_one_gradient(objective):
    [results] = run_distributed(1, both_sides_job, objective, "fp32")
    for ours, plain in zip(results["ours"], results["plain"], strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.distributed
def test_both_sides_differ_by_the_rounding_of_bf16():
    [results] = run_distributed(1, both_sides_job, "cpgd", "bf16")
    for ours, plain in zip(results["ours"], results["plain"], strict=True):
        assert ours.dtype == plain.dtype
        assert (ours.double() - plain.double()).norm() < 0.02 * plain.double().norm()


def test_the_tool_measures_both_sides_and_the_objective():
    sizes = ["--tokens", "40", "--vocab", "300", "--hidden", "16", "--repeat", "1"]
    run = subprocess.run(
        [sys.executable, TOOL, *sizes, "--dtype", "fp32", "--objectives", "gspo",
         "--response-tokens", "8", "--chunk-tokens", "16", "--device", "cpu", "--json"],
        capture_output=True, text=True, check=True, cwd=TOOL.parents[1],
    )  # fmt: skip
    result = json.loads(run.stdout)
    [row], [objective] = result["rows"], result["objectives"]
    assert row["ours"]["seconds"] > 0 and row["plain"]["seconds"] > 0
    assert row["ours"]["loss"] == pytest.approx(row["plain"]["loss"], rel=1e-4)
    assert (objective["objective"], objective["tokens"]) == ("gspo", 40)
    assert "40 tokens, plain:" in run.stderr


def test_a_plain_side_that_never_fits_is_an_error_that_says_what_to_do(bench, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 1)
    with pytest.raises(UserError, match="add a smaller count to --tokens"):
        bench.compare([make_case(bench)])


def test_an_extrapolation_is_in_proportion_to_the_tokens(bench):
    result = bench.Result(
        seconds=3.0, peak_bytes=5000, loss=1.0, grad_hidden_norm=1.0, grad_weight_norm=1.0
    )
    row = bench.Row(
        tokens=23, hidden=16, dtype="fp32", plain=result, plain_extrapolated=False, ours=result
    )
    doubled = bench._extrapolate(row, make_case(bench, tokens=46))
    assert (doubled.seconds, doubled.peak_bytes) == (6.0, 10000)
