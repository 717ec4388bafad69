"""The losses of routers and the update of their biases: every layout does what plain autograd does.

The expected gradient is that of the policy's loss, on one rank with balancing off, and that of the
routers' losses on transformers' model, sequence by sequence without any padding. Adam with a huge
epsilon steps along the gradient itself, so the change of the weights is compared with it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_cpgd.types import LossSequence
from tests.helpers.policy_jobs import logprobs_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.router_jobs import (
    Balance,
    balance_by_transformers,
    balance_job,
    life_of_a_bias_job,
    upstream_job,
)
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

BIAS = "e_score_correction_bias"
RATE = 0.01
COEFS = {"aux_loss_coef": 3.0, "z_loss_coef": 0.2}
"""Far above what anybody would use: the three gradients are of about the same size."""
EPSILON = 1e5
OPTIM = {"lr": EPSILON, "eps": EPSILON, "weight_decay": 0.0, "grad_clip": 1e9}
PADDED = {"format": "padded", "tokens_per_micro_batch": 64}
SMALL = {"tokens_per_micro_batch": 24, "logprob_chunk_tokens": 20}


@dataclass(frozen=True)
class Lab:
    """A model, its batch, and what one step has to do."""

    path: Path
    sequences: list[LossSequence]
    router: dict[str, float]
    initial: dict[str, Tensor]
    expected: Balance

    def step(self, *, sequences: list[LossSequence] | None = None, **sections: Any):
        """(results by rank, change of the HF tensors)."""
        sections = {"router": self.router, "optim": OPTIM} | sections
        sections["model"] = {"path": self.path} | sections.get("model", {})
        config = tiny_config(self.path, **sections)
        output = self.path / "trained.safetensors"
        results = run_distributed(
            config.parallel.world_size, balance_job, config, sequences or self.sequences, output
        )
        weights = load_file(output)
        output.unlink()
        assert {result["skipped"] for result in results} == {None}
        return results, {name: weights[name] - self.initial[name] for name in weights}


def make_lab(path: Path, architecture: str, router: dict[str, float], **overrides: Any) -> Lab:
    save_tiny_model(path, architecture, **overrides)
    sequences = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(path), sequences)
    sequences = with_old_logprobs(sequences, logprobs)
    expected = balance_by_transformers(
        path, sequences, aux_coef=router["aux_loss_coef"], z_coef=router["z_loss_coef"]
    )
    lab = Lab(path, sequences, router, load_file(path / "model.safetensors"), expected)
    _, change = lab.step(router={})
    policy = sum(change[name].square().sum() for name in expected.gradient)
    routers = sum(gradient.square().sum() for gradient in expected.gradient.values())
    assert 0.1 < routers / policy < 10  # neither hides a mistake of the other
    for name, gradient in expected.gradient.items():
        gradient.sub_(change[name])
    return lab


@pytest.fixture(scope="module")
def glm(tmp_path_factory) -> Lab:
    """Sigmoid scores with a bias, shared experts; the first layer is dense."""
    return make_lab(tmp_path_factory.mktemp("glm"), "glm4_moe", COEFS | {"bias_update_rate": RATE})


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Lab:
    """Softmax scores; layer 1 is dense."""
    return make_lab(tmp_path_factory.mktemp("qwen"), "qwen3_moe", COEFS, mlp_only_layers=[1])


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = sum((found[name] - expected[name]).square().sum() for name in expected)
    return (difference / sum(each.square().sum() for each in expected.values())).sqrt().item()


def wanted_biases(lab: Lab) -> list[Tensor]:
    """By layer: an expert with more than its share becomes less attractive."""
    names = sorted(name for name in lab.initial if name.endswith(BIAS))
    return [
        lab.initial[name] + lab.router["bias_update_rate"] * (loads.mean() - loads).sign().float()
        for name, loads in zip(names, lab.expected.loads.double(), strict=True)
    ]


def check(lab: Lab, parallel: dict[str, Any], **sections: Any) -> None:
    results, change = lab.step(parallel=parallel, **sections)
    gradient = {name: -each for name, each in change.items() if not name.endswith(BIAS)}
    error = relative_error(gradient, lab.expected.gradient)
    norm = sum(each.square().sum() for each in lab.expected.gradient.values()).sqrt().item()
    print(f"gradient {error:.1e}, norm {abs(results[0]['grad_norm'] / norm - 1):.1e}")
    assert error < 1e-4
    loads = lab.expected.loads / lab.expected.loads.double().mean(dim=1, keepdim=True)
    expected = {
        "router/aux_loss": lab.expected.aux_loss,
        "router/z_loss": lab.expected.z_loss,
        "router/load_max": loads.max().item(),
        "router/load_min": loads.min().item(),
    }
    for result in results:
        assert result["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert torch.equal(result["loads"], lab.expected.loads)
        found = {name: value for name, value in result["metrics"].items() if name in expected}
        assert found == pytest.approx(expected, rel=1e-5)
    exported = [lab.initial[name] + change[name] for name in sorted(change) if name.endswith(BIAS)]
    if exported:
        check_biases(lab, results, exported)


def check_biases(lab: Lab, results: list[dict[str, Any]], exported: list[Tensor]) -> None:
    """Every rank holds the biases that the loads call for, bit by bit the same."""
    for column, (wanted, written) in enumerate(zip(wanted_biases(lab), exported, strict=True)):
        assert torch.allclose(written, wanted, rtol=0, atol=1e-7)
        held = [result["biases"][column] for result in results if column in result["biases"]]
        assert held and all(torch.equal(bias, held[0]) for bias in held)
        assert torch.allclose(held[0], wanted, rtol=0, atol=1e-7)


RECOMPUTE = {"model": {"recompute": "full"}}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one rank, padded, recomputed": ({}, {"batch": PADDED} | RECOMPUTE),
    "cp2": ({"cp": 2}, {}),
    "tp2, recomputed": ({"tp": 2}, RECOMPUTE),
    "pp2_vpp2, small micro-batches": ({"pp": 2, "vpp": 2}, {"batch": SMALL}),
    "dp2_ep2, padded": ({"dp": 2, "ep": 2}, {"batch": PADDED}),
    "tp2_ep2": ({"tp": 2, "ep": 2}, {}),
}
SLOW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp2_cp2_ep2, padded, recomputed": ({"tp": 2, "cp": 2, "ep": 2}, {"batch": PADDED} | RECOMPUTE),
    "tp2_dp2_ep2_etp2": ({"tp": 2, "dp": 2, "ep": 2, "etp": 2}, {}),
    "pp2_dp2_ep2, recomputed": ({"pp": 2, "dp": 2, "ep": 2}, RECOMPUTE),
}


def test_softmax_routers_follow_the_gradient_of_transformers(qwen):
    check(qwen, {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sigmoid_routers_follow_the_gradient_of_transformers_on_every_layout(glm, layout):
    parallel, sections = LAYOUTS[layout]
    check(glm, parallel, **sections)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW)
def test_so_they_do_on_many_ranks(glm, layout):
    parallel, sections = SLOW[layout]
    check(glm, parallel, **sections)


def test_under_replay_the_routers_own_choice_counts(glm):
    """The first router sees the same inputs whatever the routes are; they all lead elsewhere."""
    elsewhere = torch.arange(4, dtype=torch.int16).expand(len(glm.expected.loads), 4)
    routed = [replace(s, routes=elsewhere.repeat(s.length, 1, 1)) for s in glm.sequences]
    replay = {"sequences": routed, "algorithm": {"routing_replay": "old_policy"}}
    [one], change = glm.step(**replay)
    first = min(name for name in glm.initial if name.endswith(BIAS))
    assert torch.allclose(glm.initial[first] + change[first], wanted_biases(glm)[0], atol=1e-7)
    [left, right], cut = glm.step(parallel={"cp": 2}, **replay, **RECOMPUTE)
    assert left["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert left["metrics"] == right["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert relative_error(cut, change) < 1e-4


def test_with_everything_off_no_bit_differs_from_upstream(glm, tmp_path):
    config = tiny_config(glm.path)
    run_distributed(1, upstream_job, config, glm.sequences, tmp_path / "upstream")
    [own] = run_distributed(1, balance_job, config, glm.sequences, tmp_path / "own")
    expected, weights = load_file(tmp_path / "upstream"), load_file(tmp_path / "own")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert own["metrics"].keys() >= {"router/load_max", "router/load_min"}
    assert not own["metrics"].keys() & {"router/aux_loss", "router/z_loss"}


def test_a_bias_moves_with_an_optimizer_step_and_with_nothing_else(glm, tmp_path):
    config = tiny_config(
        glm.path,
        router={"bias_update_rate": RATE},
        precision={"train": "bf16"},  # of the weights: a bias in bf16 would be 1e-4 off
        algorithm={"reference": {"coef": 0.1}},
    )
    [(after, counted)] = run_distributed(
        1, life_of_a_bias_job, config, glm.sequences, tmp_path / "checkpoint"
    )
    assert counted == [4 * sum(sequence.length for sequence in glm.sequences)] * 3
    start, step = after["start"], after["a step"]
    same = {"passes without gradient": start, "a skipped step": start, "going back": step}
    for name, expected in same.items():
        assert all(torch.equal(after[name][column], expected[column]) for column in expected), name
    for before, moved in ((start, step), (step, after["two steps"])):
        for column in before:
            steps = (moved[column] - before[column]) / RATE
            assert torch.allclose(steps, steps.round(), atol=1e-4)
            assert set(steps.round().tolist()) >= {-1.0, 1.0}
