"""Run as a program by test_fp8_gpu.py, on two ranks: log-probs of packed batches with cp = 2."""

import sys
from datetime import timedelta
from pathlib import Path

import torch

from megatron_cpgd.policy.parallel import join_world, leave_world
from tests.helpers.policy_jobs import build_policy
from tests.helpers.tiny import tiny_config, tiny_sequences

if __name__ == "__main__":
    model, train, out = sys.argv[1:]
    join_world(timedelta(minutes=5))
    config = tiny_config(Path(model), parallel={"cp": 2}, precision={"train": train})
    logprobs = torch.cat(build_policy(config).compute_logprobs(tiny_sequences()))
    if torch.distributed.get_rank() == 0:
        torch.save(logprobs, out)
    leave_world()
