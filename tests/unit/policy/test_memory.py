"""The heap of a rank whose tensors are in host memory."""

import os
import subprocess
import sys

import pytest

FREED_BETWEEN_KEPT = """
import torch
import megatron_cpgd.policy
from megatron_cpgd.policy.memory import _status_bytes

torch.ones(4 << 20)  # 16 MiB: glibc would from now on keep what is smaller
tensors, kept = [], []
for _ in range(16):
    tensors.append(torch.ones(2 << 20))
    kept.append(torch.ones(1 << 16))
before = _status_bytes("VmRSS")
del tensors
print((before - _status_bytes("VmRSS")) >> 20)
"""


@pytest.mark.parametrize(
    ("environment", "given_back"), [({}, 128), ({"MALLOC_MMAP_THRESHOLD_": "12582912"}, 0)]
)
def test_large_tensors_are_given_back_unless_the_c_library_is_told_otherwise(
    environment, given_back
):
    result = subprocess.run(
        [sys.executable, "-c", FREED_BETWEEN_KEPT],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert abs(int(result.stdout) - given_back) <= 8
