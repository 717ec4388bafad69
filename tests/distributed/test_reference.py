"""The reference policy: another model's weights in the live parameters, for one pass."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpgd.types import TrainSequence
from tests.helpers.policy_jobs import logprobs_job, train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.reference_jobs import broken_pass_job, interleaved_job, pull_job
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen2", tie_word_embeddings=True)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The same architecture with other weights."""
    path = tmp_path_factory.mktemp("other")
    save_tiny_model(path, "qwen2", tie_word_embeddings=True, initializer_range=0.1)
    return path


@pytest.fixture(scope="module")
def sequences(model):
    plain = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(model), plain)
    return with_old_logprobs(plain, logprobs)


def reference_config(model: Path, reference: dict, **sections):
    return tiny_config(model, algorithm={"reference": {"coef": 0.1, **reference}}, **sections)


# tp2 cuts the tied embedding, pp2_vpp2 has it twice. The fp32 main parameters of the optimizer,
# which dp2 shares out, are the weights themselves, and with bf16 a copy of them.
@pytest.mark.parametrize(
    ("parallel", "precision"),
    [({"tp": 2}, "fp32"), ({"pp": 2, "vpp": 2}, "bf16"), ({"dp": 2}, "fp32"), ({"dp": 2}, "bf16")],
    ids=["tp2", "pp2_vpp2_bf16", "dp2", "dp2_bf16"],
)
def test_a_reference_pass_is_that_of_a_fresh_policy_and_leaves_no_trace_in_the_training(
    model, other, sequences, parallel, precision, tmp_path
):
    sections = {"parallel": parallel, "precision": {"train": precision}}
    config = reference_config(model, {"path": other}, **sections)
    result = run_distributed(2, interleaved_job, config, sequences, tmp_path / "with")[0]
    plain = tiny_config(model, **sections)
    expected = run_distributed(2, train_job, plain, sequences, tmp_path / "without")[0]
    assert torch.equal(result["logprobs"], expected["logprobs"])
    trained, undisturbed = load_file(tmp_path / "with"), load_file(tmp_path / "without")
    assert all(torch.equal(trained[name], undisturbed[name]) for name in undisturbed)

    fresh = tiny_config(other, **sections)
    fresh = torch.cat(run_distributed(2, logprobs_job, fresh, sequences)[0])
    assert all(torch.equal(each, fresh) for each in result["passes"])
    assert (fresh - expected["logprobs"]).abs().max() > 0.1
    if precision == "fp32":
        [one_rank] = run_distributed(1, logprobs_job, tiny_config(other), sequences)
        assert (fresh - torch.cat(one_rank)).abs().max() < 1e-4


# The bias of the routers is a buffer, and each rank keeps its own experts.
def test_a_reference_of_experts_is_swapped_in_with_its_router_biases(tmp_path):
    paths = [tmp_path / "model", tmp_path / "other"]
    for path, spread in zip(paths, (0.2, 0.1), strict=True):
        save_tiny_model(path, "glm4_moe", initializer_range=spread)
    plain = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(paths[0]), plain)
    sequences, layout = with_old_logprobs(plain, logprobs), {"parallel": {"dp": 2, "ep": 2}}
    config = reference_config(paths[0], {"path": paths[1]}, **layout)
    target = tmp_path / "trained"
    result = run_distributed(2, interleaved_job, config, sequences, target, steps=1)[0]
    fresh = tiny_config(paths[1], **layout)
    fresh = torch.cat(run_distributed(2, logprobs_job, fresh, sequences)[0])
    assert all(torch.equal(each, fresh) for each in result["passes"])
    run_distributed(2, train_job, tiny_config(paths[0], **layout), sequences, tmp_path / "p", 1)
    trained, undisturbed = load_file(target), load_file(tmp_path / "p")
    assert all(torch.equal(trained[name], undisturbed[name]) for name in undisturbed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_a_path_the_reference_is_the_untrained_policy(
    model, sequences, precision, tmp_path
):
    config = reference_config(model, {}, precision={"train": precision})
    [result] = run_distributed(1, interleaved_job, config, sequences, tmp_path / "weights")
    assert all(torch.equal(each, result["logprobs"]) for each in result["passes"])
    assert (result["trained"] - result["logprobs"]).abs().max() > 0.1


def test_a_pass_that_raises_gives_the_weights_back(model, other, sequences):
    config = reference_config(model, {"path": other})
    [result] = run_distributed(1, broken_pass_job, config, sequences)
    assert result["message"] == "broken"
    assert result["holds_the_reference_inside"]
    assert torch.equal(result["after"], result["before"])
    [fresh] = run_distributed(1, logprobs_job, tiny_config(other), sequences)
    assert torch.equal(result["reference"], torch.cat(fresh))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_without_advantages_the_loss_pulls_the_policy_to_the_reference(model, other, estimator):
    algorithm = {
        "preset": "pg",
        "reference": {"coef": 1.0, "estimator": estimator, "path": other},
    }
    config = tiny_config(model, algorithm=algorithm)
    equal_rewards = [
        TrainSequence(
            group=i // 3,
            prompt_ids=sequence.input_ids[: sequence.prompt_length],
            response_ids=sequence.input_ids[sequence.prompt_length :],
            rollout_logprobs=torch.zeros(sequence.response_length),
            advantage=0.0,
            truncated=False,
        )
        for i, sequence in enumerate(tiny_sequences())
    ]
    [metrics] = run_distributed(1, pull_job, config, equal_rewards, 3)
    values = [each["reference/kl_k3"] for each in metrics]
    print(estimator, [f"{value:.3f}" for value in values])
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] / 10
