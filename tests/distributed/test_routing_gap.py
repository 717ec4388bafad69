"""The measured routing gap: what it counts, that it costs one pass and changes nothing."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_cpgd.types import LossSequence, TrainSequence
from tests.helpers.ranks import run_distributed
from tests.helpers.routing_jobs import (
    agreement_job,
    loop_job,
    record_job,
    rollouts_of,
    taken_job,
)
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2_ep2": {"dp": 2, "ep": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "tp2_cp2": {"tp": 2, "cp": 2},
}
LAYERS, TOP_K, EXPERTS = 3, 3, 12
"""Of a tiny Qwen3-MoE, layer 1 of four dense."""
MEASURED = {"tracking": {"routing_every": 1}}


@dataclass(frozen=True)
class Recorded:
    """A model, and where its routers send the tokens of a batch."""

    path: Path
    sequences: list[LossSequence]
    routes: list[Tensor]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.routes))

    def changed(self, change: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """`change(number of the sequence, its routes)` of copies."""
        return [change(i, routes.clone()) for i, routes in enumerate(self.routes)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Recorded:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen3_moe", mlp_only_layers=[1])
    sequences = tiny_sequences()
    config = tiny_config(path, algorithm={"routing_replay": "old_policy"})
    [(_, routes)] = run_distributed(1, record_job, config, sequences)
    assert {tuple(each.shape[1:]) for each in routes} == {(LAYERS, TOP_K)}
    return Recorded(path, sequences, routes)


def other_experts(routes: Tensor) -> Tensor:
    """Never the same set: the next expert of each, round the circle."""
    return (routes + 1) % EXPERTS


def few_tokens(i: int, routes: Tensor) -> Tensor:
    """Changed: token 0 of two sequences in the first layer, sequence 1 in the last one."""
    if i < 2:
        routes[0, 0] = other_experts(routes[0, 0])
    if i == 1:
        routes[:, 2] = other_experts(routes[:, 2])
    return routes


def with_holes(i: int, routes: Tensor) -> Tensor:
    """As the engine leaves it, the last token of each has none; sequence 2 breaks off after two
    tokens, and the first token of sequence 3 has none in one layer."""
    routes[-1] = -1
    if i == 2:
        routes[2:] = -1
    if i == 3:
        routes[0, 1] = -1
    return routes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_agreement_and_fallbacks_are_counted_exactly_on_every_layout(recorded, layout):
    tokens, count = recorded.tokens, len(recorded.routes)
    second, third = len(recorded.routes[1]), len(recorded.routes[2])
    assert len(recorded.routes[3]) > 1 and third > 3
    config = tiny_config(recorded.path, parallel=LAYOUTS[layout], **MEASURED)
    given = [
        recorded.routes,
        recorded.changed(few_tokens),
        recorded.changed(with_holes),
        recorded.changed(lambda _, routes: routes.roll(1, 0)),
        recorded.changed(lambda _, routes: routes.roll(1, 1)),
    ]
    for results in run_distributed(
        config.parallel.world_size, agreement_job, config, recorded.sequences, given
    ):
        (same, complete), (few, _), (rest, missing), (later, _), (deeper, _) = results
        assert (same.disagreement, same.by_layer, same.token_frac) == (0, [0] * LAYERS, 0)
        assert complete == 0
        assert few.disagreement == pytest.approx((2 + second) / (tokens * LAYERS))
        assert few.by_layer == pytest.approx([2 / tokens, 0, second / tokens])
        assert few.token_frac == pytest.approx((1 + second) / tokens)
        # The last token of a sequence is in no share: it is never fed.
        needed = (tokens - count) * LAYERS
        assert missing == pytest.approx(((third - 3) * LAYERS + 1) / needed)
        assert rest.disagreement == 0
        # Tokens or layers in wrong places: nearly by chance, 1 - 1 / C(12, 3) for random sets.
        assert later.disagreement > 0.8
        assert deeper.disagreement > 0.95
        assert min(deeper.by_layer) > 0.9 and deeper.token_frac > 0.95


def test_a_replay_sends_every_token_where_its_route_says(recorded):
    sequences = [
        replace(sequence, routes=other_experts(routes))
        for sequence, routes in zip(recorded.sequences, recorded.routes, strict=True)
    ]
    [results] = run_distributed(1, taken_job, tiny_config(recorded.path, **MEASURED), sequences)
    for sequence, (replayed, free) in zip(sequences, results, strict=True):
        expected = torch.zeros(replayed.shape, dtype=torch.bool)
        expected.scatter_(2, sequence.routes.long(), True)
        assert torch.equal(replayed, expected)
        assert not (free == expected).all(dim=2).any()


MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "old_policy": {"routing_replay": "old_policy"},
    "rollout": {"routing_replay": "rollout"},
    "rollout, no old pass": {"routing_replay": "rollout", "old_policy": "sampler"},
}


@pytest.fixture(scope="module")
def loop(recorded, tmp_path_factory) -> Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]:
    """loop(mode, measure) -> what a step with two optimizer steps returns, and its weights."""

    @cache
    def run(mode: str, *, measure: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        target = tmp_path_factory.mktemp("loop") / "weights.safetensors"
        config = tiny_config(
            recorded.path,
            algorithm={"mini_batches": 2, **MODES[mode]},
            **(MEASURED if measure else {}),
        )
        batch = engine_batch(recorded, routed=config.wants_rollout_routes(step=1))
        [result] = run_distributed(1, loop_job, config, batch, target)
        return result, load_file(target)

    return run


def engine_batch(recorded: Recorded, *, routed: bool) -> list[TrainSequence]:
    """Rollouts of an engine that sends a tenth of the tokens elsewhere in the first layer."""

    def elsewhere(i: int, routes: Tensor) -> Tensor:
        routes[::10, 0] = other_experts(routes[::10, 0])
        routes[-1] = -1
        return routes

    changed = recorded.changed(elsewhere)
    return rollouts_of(recorded.sequences, changed if routed else [None] * len(changed))


@pytest.mark.parametrize("mode", MODES)
def test_a_measurement_changes_no_bit_of_the_training(loop, recorded, mode):
    (plain, expected), (measured, weights) = loop(mode, measure=False), loop(mode, measure=True)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    ours, metrics = plain["metrics"], measured["metrics"]
    assert all(metrics[name] == ours[name] for name in ours if name != "routing/trainer_bytes")
    passes = 2 if mode == "rollout, no old pass" else 1
    assert measured["without_gradient"] == plain["without_gradient"] + passes
    # MoE layers * top-k * 2 bytes for each token of the engine's routes, and of recorded ones.
    nbytes = recorded.tokens * LAYERS * TOP_K * 2
    assert ours.get("routing/trainer_bytes", 0) == (0 if mode == "none" else nbytes)
    assert metrics["routing/trainer_bytes"] == (2 if mode == "old_policy" else 1) * nbytes


def test_the_measured_gaps_are_the_same_whatever_is_replayed(loop):
    names = [
        "routing/disagreement",
        "routing/free_disagreement",
        "routing/free_disagreement_layer_max",
        "routing/free_disagreement_token_frac",
        "routing/fallback_frac",
        *(
            f"routing/{kind}_{name}"
            for kind in ("free", "replayed")
            for name in ("logprob_abs_diff_mean", "logprob_abs_diff_max", "kl_k3")
        ),
    ]
    results = {mode: loop(mode, measure=True)[0]["metrics"] for mode in MODES}
    first = results["none"]
    assert first["routing/fallback_frac"] == 0
    assert first["routing/replayed_kl_k3"] != pytest.approx(first["routing/free_kl_k3"], rel=0.01)
    # The engine differs from free routing in the first layer alone, and every layer weighs a third.
    largest = first["routing/free_disagreement_layer_max"]
    assert 0.1 < largest == pytest.approx(LAYERS * first["routing/free_disagreement"])
    for metrics in results.values():
        for name in names:
            assert metrics[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name
    assert first["rollout/kl_k3"] == first["routing/free_kl_k3"]
    replayed = results["rollout"]
    assert replayed["rollout/kl_k3"] == replayed["routing/replayed_kl_k3"]
