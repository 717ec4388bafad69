"""bf16 weights with fp32 main parameters: exact where the layout does not change the arithmetic."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpgd.types import LossSequence
from tests.helpers.checkpoint_jobs import continue_job, save_job
from tests.helpers.model_jobs import save_weights_job
from tests.helpers.policy_jobs import logprobs_job, train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config

pytestmark = pytest.mark.distributed


def bf16_config(model, parallel=None, **sections):
    batch = {"tokens_per_micro_batch": 1, "tokens_per_logprob_batch": 1}
    sections = {"batch": batch, "precision": {"train": "bf16"}, **sections}
    return tiny_config(model, parallel=parallel or {}, **sections)


def equal_sequences() -> list[LossSequence]:
    """Six sequences of 12 tokens: each is a micro-batch of one shape, whatever the layout.

    With other shapes the kernels add in another order, and bf16 shows it: 1e-2 in the log-probs.
    """
    generator = torch.Generator().manual_seed(5)
    return [
        LossSequence(
            input_ids=torch.randint(131, (12,), generator=generator),
            prompt_length=4,
            tensors={
                "advantages": torch.full((8,), advantage),
                "coefficients": torch.full((8,), 0.02),
            },
        )
        for advantage in (1.0, -1.0, 0.5, -0.5, 2.0, -2.0)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen3", initializer_range=0.1)
    return path


@pytest.fixture(scope="module")
def sequences(model):
    plain = equal_sequences()
    [logprobs] = run_distributed(1, logprobs_job, bf16_config(model), plain)
    return with_old_logprobs(plain, logprobs)


def train(model, sequences, target, parallel):
    config = bf16_config(model, parallel)
    result = run_distributed(config.parallel.world_size, train_job, config, sequences, target)[0]
    assert result["skipped"] == [None] * 3
    return result, load_file(target)


@pytest.fixture(scope="module")
def one_rank(model, sequences, tmp_path_factory):
    return train(model, sequences, tmp_path_factory.mktemp("one") / "weights", {})


def differences(run, other) -> tuple[float, float, int]:
    """Largest log-prob difference before training, grad-norm difference, unequal weights."""
    logprobs = (run[0]["logprobs"] - other[0]["logprobs"]).abs().max().item()
    norms = zip(run[0]["grad_norms"], other[0]["grad_norms"], strict=True)
    unequal = sum(int((run[1][name] != other[1][name]).sum()) for name in run[1])
    return logprobs, max(abs(a - b) / b for a, b in norms), unequal


@pytest.mark.parametrize("layout", ["pp2", "pp2_vpp2", "dp2"])
def test_pipeline_and_data_parallel_are_bit_equal(model, sequences, one_rank, layout, tmp_path):
    parallel = {"pp2": {"pp": 2}, "pp2_vpp2": {"pp": 2, "vpp": 2}, "dp2": {"dp": 2}}[layout]
    logprobs, norm, unequal = differences(
        train(model, sequences, tmp_path / "w", parallel), one_rank
    )
    print(f"{layout}: log-probs {logprobs:.1e}, grad norm {norm:.1e}, {unequal} weights differ")
    assert logprobs == 0
    assert norm < 1e-6
    assert unequal == 0


# Megatron adds the parts of the tensor-parallel ranks in bf16, so these are other numbers.
@pytest.mark.parametrize("layout", ["tp2", "cp2"])
def test_tensor_and_context_parallel_are_close(model, sequences, one_rank, layout, tmp_path):
    parallel = {"tp2": {"tp": 2}, "cp2": {"cp": 2}}[layout]
    logprobs, norm, unequal = differences(
        train(model, sequences, tmp_path / "w", parallel), one_rank
    )
    print(f"{layout}: log-probs {logprobs:.1e}, grad norm {norm:.1e}, {unequal} weights differ")
    assert logprobs < 0.1
    assert norm < 0.05


@pytest.mark.parametrize("distributed", [True, False])
def test_a_checkpoint_continues_bit_by_bit(model, sequences, distributed, tmp_path):
    optim = {"lr": 1e-3, "distributed": distributed}
    config = bf16_config(model, {"dp": 2}, optim=optim)
    expected = run_distributed(2, save_job, config, sequences, tmp_path / "c")[0]
    resumed = run_distributed(2, continue_job, config, sequences, tmp_path / "c")[0]
    assert torch.equal(resumed["logprobs"], expected)


# A step is smaller than the spacing of bf16: main parameters rebuilt from the weights lose it.
def test_a_checkpoint_holds_the_fp32_main_parameters_for_another_layout(model, sequences, tmp_path):
    folder = tmp_path / "c"
    expected = run_distributed(2, save_job, bf16_config(model, {"dp": 2}), sequences, folder)[0]
    config = bf16_config(model, {"pp": 2})
    resumed = run_distributed(2, continue_job, config, sequences, folder)[0]
    assert torch.equal(resumed["logprobs"], expected)


# Nothing was trained yet, so the checkpoint has weights only.
def test_weights_alone_replace_the_main_parameters_too(model, sequences, tmp_path):
    config = bf16_config(model)
    run_distributed(1, save_weights_job, config, tmp_path / "c")
    other = tmp_path / "other"
    save_tiny_model(other, "qwen3", initializer_range=0.3)
    replaced = run_distributed(1, continue_job, bf16_config(other), sequences, tmp_path / "c")[0]
    fresh = run_distributed(1, continue_job, config, sequences, tmp_path / "c")[0]
    assert torch.equal(replaced["logprobs"], fresh["logprobs"])
