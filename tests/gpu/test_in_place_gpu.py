"""Another process reads the weights in the memory of the same GPU: `pytest -m gpu`.

Not yet run on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpgd.weight_sync.in_place import InPlaceWeights
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, with_old_logprobs
from tests.helpers.tiny import GPU_SIZES, save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reader():
    """Starts the other process; what it says comes line by line."""
    processes = []

    def start(path: Path) -> "subprocess.Popen[str]":
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.in_place_reader", str(path), "cuda:0"],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("rollout", ["bf16", "fp8_block"])
def test_another_process_sees_every_update_without_a_copy(tmp_path, reader, rollout):
    save_tiny_model(tmp_path, "qwen3", **GPU_SIZES)
    config = tiny_config(tmp_path, precision={"train": "bf16", "rollout": rollout})
    policy, sequences = build_policy(config), tiny_sequences()
    batch = with_old_logprobs(sequences, policy.compute_logprobs(sequences))
    weights = InPlaceWeights(policy, policy._table, rollout, beside_rank_0=True)
    other = reader(weights.path)
    sums = []
    for _ in range(3):
        sums.append(str(weights.fingerprints()))
        other.stdin.write("\n")
        assert other.stdout.readline().strip() == sums[-1]
        assert policy.train_step(batch, OBJECTIVE).skipped is None
    assert len(set(sums)) == 3
    weights.close()
