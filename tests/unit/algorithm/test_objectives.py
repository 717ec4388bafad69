"""Every preset against its published formula, which tests/helpers/published_losses.py has."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_cpgd.algorithm.advantages import compute_advantages
from megatron_cpgd.algorithm.loss_sequences import build_loss_sequences, searched_clip
from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.algorithm.reference_kl import reference_kl, reference_metrics
from megatron_cpgd.algorithm.sequences import one_rank_sequences
from megatron_cpgd.config.algorithm import AlgorithmConfig, BalancedClip
from megatron_cpgd.config.presets import PRESETS
from megatron_cpgd.types import LossSequence, TrainSequence
from tests.helpers.published_losses import Batch, make_batch, published_loss

quick = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])


BATCHES = {
    "uneven": make_batch(
        [5, 2, 9, 4, 0, 3, 7, 1, 6],
        [[1.0, 0.0, 0.25], [1.0, 0.0, 0.0], [0.5, 0.5, 0.5]],
        seed=1,
    ),
    "tiny groups": make_batch(
        [12, 3, 1, 0, 6, 6], [[0.0, 1.0], [2.0, 0.5], [1.0, 0.0]], seed=2, staleness=0.6
    ),
    "far": make_batch([8, 6, 7, 9], [[1.0, 0.0], [0.0, 1.0]], seed=6, staleness=1.8, mismatch=1.5),
}


def advantages_of(batch: Batch, config: AlgorithmConfig) -> Tensor:
    return compute_advantages(
        batch.rewards,
        prompt_weight=config.prompt_weight.type,
        max_weight=config.prompt_weight.max_weight,
        baseline=config.advantage.baseline,
        whiten_lengths=batch.lengths if config.advantage.whiten else None,
    ).values


def loss_sequences(batch: Batch, config: AlgorithmConfig) -> list[LossSequence]:
    """As the training loop makes them."""
    sequences = [
        TrainSequence(
            group=i // batch.rewards.shape[1],
            prompt_ids=torch.tensor([0]),
            response_ids=torch.zeros(len(old), dtype=torch.int64),
            rollout_logprobs=rollout,
            advantage=advantage,
            truncated=False,
            old_logprobs=old,
            ref_logprobs=ref,
        )
        for i, (advantage, old, rollout, ref) in enumerate(
            zip(advantages_of(batch, config).flatten().tolist(), batch.old, batch.rollout,
                batch.ref, strict=True)
        )
    ]  # fmt: skip
    if isinstance(config.clip, BalancedClip):
        clip = searched_clip(sequences, batch.live, config.clip)
        config = config.model_copy(update={"clip": clip})
    return build_loss_sequences(sequences, config)


def evaluate(
    sequences: list[LossSequence], live: list[Tensor], config: AlgorithmConfig
) -> tuple[Tensor, list[Tensor], dict[str, float]]:
    """Loss, force on every token and metrics of one micro-batch, in float64, with junk between."""
    leaves = [x.double().requires_grad_() for x in live]
    junk = torch.full((2,), math.nan, dtype=torch.float64)

    def pack(parts: list[Tensor]) -> Tensor:
        return torch.cat([x for part in parts for x in (junk.to(part.dtype), part)])[None]

    names = sequences[0].tensors if sequences else []
    tokens = {name: pack([s.tensors[name].double() for s in sequences]) for name in names}
    index = pack([torch.full((len(x),), float(i)) for i, x in enumerate(live)])
    index = index.nan_to_num(-1).long()
    tokens["loss_mask"] = index >= 0
    packed = pack(leaves)
    objective = build_objective(config)
    loss, statistics = objective.evaluate(
        packed, packed.detach(), tokens, one_rank_sequences(index)
    )
    forces = torch.autograd.grad(loss, leaves, allow_unused=True)
    forces = [torch.zeros_like(x) if f is None else f for x, f in zip(leaves, forces, strict=True)]
    return loss.detach(), forces, statistics.finish()


# --- the published formulas ----------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_force_are_those_of_the_published_formula(name, batch):
    config = AlgorithmConfig(preset=name)
    live = [x.double().requires_grad_() for x in batch.live]
    expected = published_loss(name, batch, live, [x.detach() for x in live])
    expected_forces = torch.autograd.grad(expected, live, allow_unused=True)
    loss, forces, metrics = evaluate(loss_sequences(batch, config), batch.live, config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    scale = max(f.abs().max() for f in expected_forces if f is not None and len(f))
    assert scale > 0
    for force, wanted in zip(forces, expected_forces, strict=True):
        wanted = torch.zeros_like(force) if wanted is None else wanted
        torch.testing.assert_close(force, wanted, rtol=1e-6, atol=1e-6 * scale.item())
    assert metrics["policy/loss"] == loss.item()


@pytest.mark.parametrize("name", PRESETS)
def test_force_is_the_finite_difference_with_the_stop_gradients_held(name):
    batch, config = BATCHES["uneven"], AlgorithmConfig(preset=name)
    _, forces, _ = evaluate(loss_sequences(batch, config), batch.live, config)
    fixed = [x.double() for x in batch.live]
    step = 1e-6
    for response, token in [(0, 0), (0, 4), (2, 3), (3, 2), (5, 1), (7, 0)]:
        losses = []
        for sign in (1, -1):
            live = [x.clone() for x in fixed]
            live[response][token] += sign * step
            losses.append(published_loss(name, batch, live, fixed))
        slope = ((losses[0] - losses[1]) / (2 * step)).item()
        assert forces[response][token].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


# --- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@quick
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 9), max_size=3), data=st.data())
def test_any_order_and_any_split_give_the_same_loss_and_forces(name, seed, cuts, data):
    config, batch = AlgorithmConfig(preset=name), BATCHES["uneven"]
    batch = make_batch(batch.lengths.flatten().tolist(), batch.rewards.tolist(), seed=seed)
    sequences = loss_sequences(batch, config)
    loss, forces, _ = evaluate(sequences, batch.live, config)
    order = data.draw(st.permutations(range(9)))
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in pairwise([0, *sorted(cuts), 9]):
        part = order[start:stop]
        if not part:
            continue
        part_loss, part_forces, _ = evaluate(
            [sequences[i] for i in part], [batch.live[i] for i in part], config
        )
        total += part_loss
        for i, force in zip(part, part_forces, strict=True):
            torch.testing.assert_close(force, forces[i], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(total, loss, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "reinforce_pp"])
def test_a_constant_on_the_rewards_of_a_group_changes_nothing(name):
    # In eighths, so that the shift is exact; not where there is no baseline in the group.
    config, batch = AlgorithmConfig(preset=name), BATCHES["uneven"]
    expected = advantages_of(batch, config)
    shift = torch.tensor([[0.125], [-2.0], [8.0]])
    batch = replace(batch, rewards=batch.rewards + shift)
    torch.testing.assert_close(advantages_of(batch, config), expected)


@pytest.mark.parametrize("name", PRESETS)
def test_at_ratio_one_every_force_is_minus_the_advantage_times_the_coefficient(name):
    config = AlgorithmConfig(preset=name)
    batch = make_batch([4, 2, 0, 3], [[1.0, 0.0], [0.0, 1.0]], seed=3, staleness=0, mismatch=0)
    sequences = loss_sequences(batch, config)
    _, forces, metrics = evaluate(sequences, batch.live, config)
    for sequence, force in zip(sequences, forces, strict=True):
        tensors = {name: x.double() for name, x in sequence.tensors.items()}
        expected = -tensors["coefficients"] * tensors["advantages"]
        torch.testing.assert_close(force, expected, rtol=1e-6, atol=1e-12)
    assert metrics["policy/masked_frac"] == 0.0


def test_cpg_with_truncated_weights_and_token_sums_is_minirl_at_ratio_one():
    batch = make_batch([4, 2, 7, 3], [[1.0, 0.0], [0.0, 1.0]], seed=4, staleness=0, mismatch=1.5)
    composed = AlgorithmConfig.model_validate(
        {
            "preset": "cpg",
            "prompt_weight": {"type": "equal"},
            "correction": {"type": "truncate", "high": 5.0},
            "aggregation": {"type": "sequence_mean_token_sum"},
        }
    )
    minirl_config = AlgorithmConfig(preset="minirl")
    _, ours, _ = evaluate(loss_sequences(batch, composed), batch.live, composed)
    _, theirs, _ = evaluate(loss_sequences(batch, minirl_config), batch.live, minirl_config)
    plain = AlgorithmConfig.model_validate(composed.model_dump() | {"correction": {"type": "none"}})
    _, uncorrected, _ = evaluate(loss_sequences(batch, plain), batch.live, plain)
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=1e-6, atol=1e-9)
    assert (torch.cat(uncorrected) - torch.cat(ours)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "advantage", "ratio", "expected"),
    [
        ("ppo_clip", -1.0, 50.0, 50.0),  # the recovery force grows with the ratio ...
        ("dual_clip", -1.0, 50.0, 0.0),  # ... is cut off ...
        ("minirl", -1.0, 50.0, 5.0),  # ... is capped ...
        ("cpgd", -1.0, 50.0, 1.02),  # ... or never there: 1 + alpha c
        ("ppo_clip", 1.0, 1.3, 0.0),
        ("ppo_clip_drift", 1.0, 1.3, 0.003),
        ("cispo", 1.0, 1.3, -1.3),
        ("dapo", 1.0, 1.27, -1.27),
        ("dapo", 1.0, 1.29, 0.0),
        ("dppo_tv", 1.0, 1.3, -1.3),  # .013 -> .0165: a large ratio, a small change
        ("vespo", 1.0, 2.0, -4 * math.exp(-3)),  # phi(2) = 2^2 e^(3 (1 - 2))
    ],
)
def test_the_force_of_one_token_by_hand(name, advantage, ratio, expected):
    config = AlgorithmConfig(preset=name)
    old = torch.tensor([-4.34], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    tensors = {"advantages": advantage * one, "coefficients": one, "old_logprobs": old}
    if config.clip.type == "constant":
        tensors["log_clip_low"] = one * math.log1p(-config.clip.low)
        tensors["log_clip_high"] = one * math.log1p(config.clip.high)
    tensors["rollout_logprobs"] = old
    sequence = LossSequence(input_ids=torch.zeros(2).long(), prompt_length=1, tensors=tensors)
    _, [force], _ = evaluate([sequence], [old + math.log(ratio)], config)
    assert force.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", PRESETS)
def test_a_log_prob_that_is_not_a_number_is_not_hidden(name):
    config, batch = AlgorithmConfig(preset=name), BATCHES["uneven"]
    live = [x.clone() for x in batch.live]
    live[2][3] = math.nan
    loss, _, _ = evaluate(loss_sequences(batch, config), live, config)
    assert loss.isnan()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("jump", [500.0, -500.0])
def test_an_extreme_ratio_stays_finite(name, jump):
    config, batch = AlgorithmConfig(preset=name), BATCHES["uneven"]
    live = [x + jump for x in batch.live]
    loss, forces, _ = evaluate(loss_sequences(batch, config), live, config)
    assert loss.isfinite() and torch.cat(forces).isfinite().all()


# --- pieces that no preset turns on --------------------------------------------------------------


def test_off_policy_mask_drops_only_bad_responses_that_have_become_unlikely():
    # mean(log mu - log pi) = .3 everywhere, above .2: only A < 0 is dropped
    config = AlgorithmConfig.model_validate(
        {"preset": "pg", "prompt_weight": {"type": "equal"}, "rejection": {"off_policy_delta": 0.2}}
    )
    batch = make_batch([3, 2], [[1.0, 0.0]], seed=5, staleness=0, mismatch=0)
    live = [x - 0.3 for x in batch.live]
    _, (good, bad), metrics = evaluate(loss_sequences(batch, config), live, config)
    assert good.tolist() == pytest.approx([-0.1] * 3) and bad.tolist() == [0.0, 0.0]
    assert metrics["policy/masked_frac"] == 2 / 5
    _, (_, bad), _ = evaluate(loss_sequences(batch, config), batch.live, config)
    assert bad.tolist() == pytest.approx([0.1] * 2)


@pytest.mark.parametrize(
    ("estimator", "value", "force"),
    [
        ("k1", -math.log(2), 1.0),  # q = ln(pi_ref / pi) = ln 2
        ("k2", math.log(2) ** 2 / 2, -math.log(2)),
        ("k3", 2 - 1 - math.log(2), 1 - 2),
    ],
)
def test_reference_estimators_by_hand(estimator, value, force):
    logprobs = torch.tensor([-1.0], dtype=torch.float64)
    result = reference_kl(logprobs, logprobs + math.log(2), estimator)
    assert [x.item() for x in result] == pytest.approx([value, force])


def test_the_reference_metrics_are_means_over_the_tokens():
    # q = ln 2 and -ln 2: k1 = -q has the mean 0, k3 = e^q - 1 - q the mean (1 + (-1/2)) / 2 = 1/4
    logprobs = torch.tensor([-1.0, -2.0])
    q = torch.tensor([math.log(2), -math.log(2)])
    metrics = reference_metrics(logprobs, logprobs + q)
    assert metrics == pytest.approx({"reference/kl_k1": 0.0, "reference/kl_k3": 0.25}, abs=1e-6)
    assert reference_metrics(logprobs, logprobs) == {"reference/kl_k1": 0, "reference/kl_k3": 0}
    assert reference_metrics(logprobs[:0], q[:0]) == {}


def test_the_reference_term_is_scaled_by_beta_and_not_by_the_correction():
    # G = c (-A W + beta (1 - e^q)): c = 1/2, A = 1, W = 0, beta = .1, q = ln 3: -.1 each
    config = AlgorithmConfig.model_validate({"preset": "pg", "reference": {"coef": 0.1}})
    one = torch.ones(1)
    tensors = {
        "advantages": one, "coefficients": 0 * one, "old_logprobs": -one,
        "ref_logprobs": -one + math.log(3), "ref_coefficients": one / 2,
    }  # fmt: skip
    sequence = LossSequence(input_ids=torch.zeros(2).long(), prompt_length=1, tensors=tensors)
    loss, [force], _ = evaluate([sequence], [-one], config)
    assert force.item() == pytest.approx(-0.1)
    assert loss.item() == pytest.approx(0.05 * (2 - math.log(3)))
