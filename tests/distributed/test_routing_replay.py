"""Replayed routes: every layout trains like one rank, for as many steps as one likes.

Routes come from a model whose routers score the experts in reverse order, so hardly a token goes
where the trained model would send it. The measured differences are printed: `pytest -rP`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_cpgd.types import LossSequence, TrainSequence
from tests.helpers.parity import Reference, errors, train
from tests.helpers.policy_jobs import with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.routing_jobs import (
    loop_job,
    own_routes_job,
    passes_job,
    record_job,
    rollouts_of,
)
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

REPLAY: dict[str, Any] = {"algorithm": {"routing_replay": "old_policy"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2_ep2": {"dp": 2, "ep": 2},
    "tp2_ep2": {"tp": 2, "ep": 2},
    "pp2_dp2_ep2": {"pp": 2, "dp": 2, "ep": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
    "tp2_cp2": {"tp": 2, "cp": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A mixture of experts, layer 1 dense, and the same with its routers' rows reversed."""
    return save_models(tmp_path_factory, "qwen3_moe", mlp_only_layers=[1])


def save_models(tmp_path_factory, architecture: str, **overrides: Any) -> tuple[Path, Path]:
    path, reversed_path = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("reversed")
    model = save_tiny_model(path, architecture, **overrides)
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.flip(0))
    model.save_pretrained(reversed_path)
    return path, reversed_path


@pytest.fixture(scope="module")
def reference(folders) -> Reference:
    return make_replay_reference(*folders)


def make_replay_reference(path: Path, reversed_path: Path) -> Reference:
    sequences = tiny_sequences()
    config = tiny_config(reversed_path, **REPLAY)
    [(logprobs, routes)] = run_distributed(1, record_job, config, sequences)
    lengths = [sequence.response_length for sequence in sequences]
    sequences = with_old_logprobs(sequences, list(logprobs.split(lengths)))
    sequences = [replace(s, routes=own) for s, own in zip(sequences, routes, strict=True)]
    run = train(path, sequences, 3, **REPLAY)
    return Reference(path, sequences, 3, run, load_file(path / "model.safetensors"))


def check(reference: Reference, parallel: dict[str, Any], **sections: Any) -> None:
    run = reference.train(parallel, **(REPLAY | sections))
    logprobs, norm, update = errors(run, reference)
    assert logprobs < 1e-4
    assert norm < 1e-5
    assert update < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_with_replayed_routes_equal_those_of_one_rank(reference, layout):
    check(reference, LAYOUTS[layout])


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Reference:
    """Latent attention, shared experts; sigmoid scores with a bias, limited to some groups."""
    return make_replay_reference(*save_models(tmp_path_factory, "deepseek_v3"))


DEEPSEEK_LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_ep2": {"tp": 2, "ep": 2},
    "dp2_ep2": {"dp": 2, "ep": 2},
    "dp4_ep4": {"dp": 4, "ep": 4},
    "tp2_dp2_ep2_etp2": {"tp": 2, "dp": 2, "ep": 2, "etp": 2},
    "pp2_dp2_ep2": {"pp": 2, "dp": 2, "ep": 2},
    "cp2_ep2": {"cp": 2, "ep": 2},
    "tp2_pp2_ep2": {"tp": 2, "pp": 2, "ep": 2},
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=() if name == "tp2_ep2" else pytest.mark.slow)
        for name in DEEPSEEK_LAYOUTS
    ],
)
def test_so_do_three_of_deepseek_v3(deepseek, layout):
    check(deepseek, DEEPSEEK_LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["pp2_vpp2", "tp2_cp2"])
def test_so_do_steps_on_padded_batches_with_recomputation(reference, layout):
    check(
        reference,
        LAYOUTS[layout],
        batch={"format": "padded", "tokens_per_micro_batch": 64},
        model={"path": reference.path, "recompute": "full"},
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_records_the_routes_of_one_rank(folders, reference, layout):
    config = tiny_config(folders[1], parallel=LAYOUTS[layout], **REPLAY)
    for _, routes in run_distributed(
        config.parallel.world_size, record_job, config, bare(reference)
    ):
        for ours, sequence in zip(routes, reference.sequences, strict=True):
            assert torch.equal(ours.sort(-1).values, sequence.routes.sort(-1).values)


def test_recorded_routes_are_the_experts_that_transformers_chooses(folders, reference):
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    for sequence in reference.sequences:
        with torch.no_grad():
            logits = model(sequence.input_ids[None], output_router_logits=True).router_logits
        experts = torch.stack([layer.topk(3).indices for layer in logits], dim=1)
        assert torch.equal(experts.sort(-1).values, sequence.routes.long().sort(-1).values)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_replaying_the_routers_own_choice_changes_no_bit(reference, tmp_path, recompute):
    model = {"path": reference.path, "recompute": recompute}
    sequences, weights = bare(reference), tmp_path / "weights.safetensors"
    config = tiny_config(reference.path, model=model, **REPLAY)
    [own] = run_distributed(1, own_routes_job, config, sequences, weights)
    assert torch.equal(own["recorded"], own["replayed"])
    # The gates of upstream's own pass with gradient, which has the experts in the same order.
    free = train(reference.path, sequences, 1)
    assert all(torch.equal(own["weights"][name], free.weights[name]) for name in free.weights)


# Sigmoid scores with a bias that counts for the choice alone; DeepSeek's groups of experts too. The
# logits of gpt-oss's router have a bias.
@pytest.mark.parametrize("architecture", ["glm4_moe", "deepseek_v3", "gpt_oss"])
def test_so_it_is_with_other_routers(tmp_path, architecture):
    save_tiny_model(tmp_path, architecture)
    sequences = with_old_logprobs(
        tiny_sequences(), [torch.zeros(s.response_length) for s in tiny_sequences()]
    )
    config = tiny_config(tmp_path, **REPLAY)
    [own] = run_distributed(1, own_routes_job, config, sequences, tmp_path / "weights")
    assert torch.equal(own["recorded"], own["replayed"])
    free = train(tmp_path, sequences, 1)
    assert all(torch.equal(own["weights"][name], free.weights[name]) for name in free.weights)


@pytest.mark.parametrize("layout", ["one", "pp2_vpp2", "tp2_cp2"])
def test_passes_use_the_routes_that_they_should(reference, layout):
    config = tiny_config(
        reference.path,
        parallel=LAYOUTS.get(layout, {}),
        model={"path": reference.path, "recompute": "full"},
        algorithm=REPLAY["algorithm"] | {"reference": {"coef": 0.1}},
    )
    results = run_distributed(config.parallel.world_size, passes_job, config, reference.sequences)
    for result in results:
        assert torch.equal(result["compared"], result["free"])
        assert torch.equal(result["nowhere"], result["recorded"])
        assert torch.equal(result["reference"], result["free"])  # the same weights, free routing
        assert (result["replayed"] - result["free"]).abs().mean() > 0.1
        assert (result["fallback_nowhere"], result["fallback"]) == (1.0, 0.0)
        # A set of 3 of 12 in reverse order is rarely the same one.
        assert result["disagreement"] == results[0]["disagreement"] > 0.9
        for forwards, recomputed in result["uses"]:
            assert forwards == recomputed > 1


@pytest.fixture(scope="module", params=["old_policy", "rollout"])
def loop(request, reference, tmp_path_factory):
    """Trains on one rollout batch: parallel sizes -> result and weights."""
    algorithm = {
        "routing_replay": request.param, "mini_batches": 2, "epochs": 2, "reference": {"coef": 0.1}
    }  # fmt: skip
    batch = train_sequences(reference, routed=request.param == "rollout")

    def train(parallel: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        target = tmp_path_factory.mktemp("loop") / "weights.safetensors"
        config = tiny_config(
            reference.path,
            parallel=parallel,
            algorithm=algorithm,
            batch={"tokens_per_micro_batch": 96},
            optim={"lr": 1e-4},  # four steps with few tokens that come near a clip bound
        )
        results = run_distributed(config.parallel.world_size, loop_job, config, batch, target)
        return results[-1], load_file(target)

    return request.param, train, train({})


def test_every_pass_of_the_loop_replays_but_those_of_the_reference_and_of_the_recording(loop):
    source, _, (result, _) = loop
    steps = [True, True, False, True, True]  # two epochs; before the second its weights
    assert result["passes"] == ([False, *steps] if source == "rollout" else steps)
    assert ("routing/disagreement" in result["metrics"]) == (source == "rollout")


@pytest.mark.parametrize("layout", ["pp2_vpp2", "tp2_ep2"])
def test_a_rollout_batch_trains_like_on_one_rank(loop, reference, layout):
    _, train, (expected_result, expected) = loop
    result, weights = train(LAYOUTS[layout])
    assert result["metrics"] == pytest.approx(expected_result["metrics"], rel=1e-3, abs=1e-4)
    difference = sum((weights[n] - expected[n]).square().sum() for n in expected)
    update = sum((expected[n] - reference.initial[n]).square().sum() for n in expected)
    error = (difference / update).sqrt()
    print(f"update {error:.1e}")
    assert error < 1e-3


def train_sequences(reference: Reference, *, routed: bool) -> list[TrainSequence]:
    routes = [each.routes if routed else None for each in reference.sequences]
    return rollouts_of(reference.sequences, routes)


def bare(reference: Reference) -> list[LossSequence]:
    return [replace(sequence, routes=None) for sequence in reference.sequences]
