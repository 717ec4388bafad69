"""FP8 on a GPU, packed batches, and context parallelism on two: `pytest -m gpu`.

Not yet run on a GPU. Tolerances: FP8 keeps 3 bits behind the leading one, a relative error of up to
1/16 and 0.027 on average of each factor, which sums of 256 products and more average away.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cpgd.config.schema import ExperimentConfig, PrecisionConfig
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.policy.fp8 import require_fp8
from megatron_cpgd.weights.quantize import FP8, quantize, scale_shape
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, with_old_logprobs
from tests.helpers.tiny import GPU_SIZES, save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
RECIPES = ["fp8_blockwise", "fp8_tensorwise", "fp8_delayed", "mxfp8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen2")
    save_tiny_model(path, "qwen2", **GPU_SIZES)
    return path


def config_of(path: Path, train: str = "bf16", **sections) -> ExperimentConfig:
    batch = {"tokens_per_micro_batch": 256} | sections.pop("batch", {})
    return tiny_config(path, precision={"train": train}, batch=batch, **sections)


def step(config: ExperimentConfig) -> tuple[torch.Tensor, float, float, torch.Tensor]:
    """Log-probs before, loss, gradient norm, log-probs after one optimizer step."""
    policy, sequences = build_policy(config), tiny_sequences()
    before = policy.compute_logprobs(sequences)
    result = policy.train_step(with_old_logprobs(sequences, reference(config)), OBJECTIVE)
    assert result.skipped is None
    after = policy.compute_logprobs(sequences)
    return torch.cat(before), result.metrics["policy/loss"], result.grad_norm, torch.cat(after)


def reference(config: ExperimentConfig) -> list[torch.Tensor]:
    """Old log-probs that all compared steps share: those of bf16, packed."""
    return build_policy(config_of(config.model.path)).compute_logprobs(tiny_sequences())


def supported(train: str) -> None:
    try:
        require_fp8(PrecisionConfig(train=train))
    except ConfigError as error:
        pytest.skip(str(error))


def test_a_packed_step_is_the_padded_step(model):
    packed, padded = (step(config_of(model, batch={"format": f})) for f in ("packed", "padded"))
    assert (packed[0] - padded[0]).abs().mean() < 0.01
    assert packed[1] == pytest.approx(padded[1], rel=0.05, abs=1e-4)
    assert packed[2] == pytest.approx(padded[2], rel=0.05)
    assert (packed[3] - padded[3]).abs().mean() < 0.02


@pytest.mark.parametrize("format", ["packed", "padded"])
@pytest.mark.parametrize("train", RECIPES)
def test_an_fp8_step_is_close_to_the_bf16_step(model, train, format):
    supported(train)
    batch = {"format": format}
    fp8, bf16 = (step(config_of(model, each, batch=batch)) for each in (train, "bf16"))
    error = (fp8[0] - bf16[0]).abs()
    print(f"{train} {format}: |log-prob difference| mean {error.mean():.1e}, max {error.max():.1e}")
    print(f"loss {fp8[1]:.4e} and {bf16[1]:.4e}, norm {fp8[2]:.4e} and {bf16[2]:.4e}")
    assert 0 < error.mean() < 0.1, "0: nothing was computed in FP8"
    assert fp8[1] == pytest.approx(bf16[1], rel=0.2, abs=1e-3)
    assert fp8[2] == pytest.approx(bf16[2], rel=0.2)


def test_layers_that_stay_in_bf16_bring_the_logprobs_closer(model):
    supported("fp8_tensorwise")
    sequences = tiny_sequences()
    exact = torch.cat(build_policy(config_of(model)).compute_logprobs(sequences))
    errors = []
    for layers in (0, 2):  # 2 at each end: all four
        config = tiny_config(model, precision={"train": "fp8_tensorwise", "bf16_layers": layers})
        found = torch.cat(build_policy(config).compute_logprobs(sequences))
        errors.append((found - exact).abs().mean())
    assert errors[1] < 0.1 * errors[0]


def test_the_gpu_quantises_bit_by_bit_as_the_cpu():
    weight = (torch.randn(700, 900) * 0.02).bfloat16()
    results = []
    for device in ("cpu", "cuda"):
        codes, scales = torch.empty(700, 900, dtype=FP8), torch.empty(scale_shape((700, 900)))
        quantize(weight, codes, scales, device=torch.device(device))
        results.append((codes.view(torch.uint8), scales))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("train", ["bf16", "fp8_blockwise"])
def test_context_parallel_packed_logprobs_are_those_of_one_rank(model, train, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, there is {torch.cuda.device_count()}")
    supported(train)
    whole = torch.cat(build_policy(config_of(model, train)).compute_logprobs(tiny_sequences()))
    out = tmp_path / "logprobs.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.gpu.context_parallel_job", str(model), train, str(out)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    error = (torch.load(out) - whole).abs()
    print(f"cp2 {train}: |log-prob difference| mean {error.mean():.1e}, max {error.max():.1e}")
    assert error.mean() < (0.01 if train == "bf16" else 0.1)
