"""The claims of arXiv:2505.12504 where they can be computed exactly: bandits with a softmax policy.

docs/objective.md says which of them hold.
"""

import math

import pytest
import torch
from torch import Tensor

from megatron_cpgd.algorithm.cpgd import drift_weight, log_ratio_term
from megatron_cpgd.algorithm.surrogate import TokenInputs
from tests.helpers.bandit import logit_gradient

FREE = {"preset": "pg"}
LOW, HIGH = math.log(0.8), math.log(1.2)


def expected_gradient(old: Tensor, logits: Tensor, rewards: Tensor, alpha: float) -> Tensor:
    """Of the unclipped objective with an uncapped drift, under samples of pi_old."""
    drift = {"coef": alpha, "gradient_clip": 1e6}
    return logit_gradient(logits, old, old.exp(), rewards, drift=drift)


def random_policies(seed: int) -> tuple[Tensor, Tensor]:
    """log pi_old and the logits of pi_theta, six tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return logits[0].log_softmax(0), logits[1]


# --- Proposition 1: how far a step leaves the clip range -----------------------------------------


def ratio_after_one_step(preset: str, *, ratio: float, advantage: float, step: float) -> float:
    """Of one sampled token that had probability .25 under pi_old, after a step on the logits."""
    probabilities = torch.full((4,), (1 - 0.25 * ratio) / 3, dtype=torch.float64)
    probabilities[0] = 0.25 * ratio
    old = torch.full((4,), 0.25, dtype=torch.float64).log()
    sampled = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    logits = probabilities.log()
    gradient = logit_gradient(
        logits, old, sampled, advantage * sampled, preset=preset, clip={"type": "constant"}
    )
    return ((logits - step * gradient).softmax(0)[0] / 0.25).item()


@pytest.mark.parametrize("step", [0.01, 0.1, 1.0])
def test_proposition_1_holds_on_the_upper_side(step):
    # r0 = 1 + eps, A > 0: both leave the range, PPO with r0 = 1.2 times the gradient
    setting = {"ratio": 1.2 - 1e-9, "advantage": 1.0, "step": step}
    ppo, cpg = (ratio_after_one_step(preset, **setting) for preset in ("ppo_clip", "cpg"))
    assert ppo - 1 > cpg - 1 > 0.2


@pytest.mark.parametrize("step", [0.01, 0.1, 1.0])
def test_proposition_1_is_reversed_on_the_lower_side(step):
    # r0 = 1 - eps, A < 0: PPO's gradient is only r0 = .8 times CPG's. The paper claims the same
    # order as above; its proof has the sign of g'(0) wrong here.
    setting = {"ratio": 0.8 + 1e-9, "advantage": -1.0, "step": step}
    ppo, cpg = (ratio_after_one_step(preset, **setting) for preset in ("ppo_clip", "cpg"))
    assert 1 - cpg > 1 - ppo > 0.2


# --- k1, k3 and the drift ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_k1_and_the_drift_have_the_same_expected_gradient(seed):
    old, logits = random_policies(seed)
    expected = logits.softmax(0) - old.exp()  # of KL(pi_old, pi_theta)
    # k1 = -l has the gradient of a policy term with A = 1, whatever the ratio; k3's is r - 1.
    one = torch.ones_like(old)
    torch.testing.assert_close(expected_gradient(old, logits, one, 0.0), expected)
    torch.testing.assert_close(expected_gradient(old, logits, 0 * one, 1.0), expected)


@pytest.mark.parametrize("seed", range(5))
def test_the_bias_of_the_capped_drift_is_what_the_cap_takes(seed):
    old, logits = random_policies(seed)
    zero, cap = torch.zeros_like(old), 0.5
    excess = ((logits.log_softmax(0) - old).exp() - 1 - cap).clamp(min=0)
    assert excess.sum() > 0
    drift = {"coef": 1.0, "gradient_clip": cap}
    capped = logit_gradient(logits, old, old.exp(), zero, drift=drift)
    lost = logit_gradient(logits, old, old.exp() * excess, -torch.ones_like(old), **FREE)
    torch.testing.assert_close(capped + lost, expected_gradient(old, logits, zero, 1.0))


# --- the baseline as a drift ---------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 0.01])
@pytest.mark.parametrize("seed", range(5))
def test_a_baseline_is_a_negative_drift(seed, alpha):
    # E[(R - b) l] - alpha KL = E[R l] - (alpha - b) KL: with b > alpha the policy seeks drift.
    old, logits = random_policies(seed)
    rewards, baseline = torch.tensor([1.0, 0, 0, 1, 0.5, 0], dtype=torch.float64), 0.3
    divergence_gradient = logits.softmax(0) - old.exp()
    expected = (
        expected_gradient(old, logits, rewards, 0.0) + (alpha - baseline) * divergence_gradient
    )
    torch.testing.assert_close(expected_gradient(old, logits, rewards - baseline, alpha), expected)


# --- Theorem 1: the return grows -----------------------------------------------------------------


def force(log_ratio: Tensor, advantages: Tensor, alpha: float) -> Tensor:
    """Of CPGD per token, from the terms of the package; any shape."""
    term = log_ratio_term(token_inputs(log_ratio, advantages))
    return term.force + alpha * drift_weight(log_ratio, math.inf)


def token_inputs(log_ratio: Tensor, advantages: Tensor) -> TokenInputs:
    return TokenInputs(
        logprobs=log_ratio,
        old_logprobs=torch.zeros_like(log_ratio),
        advantages=advantages,
        log_clip_low=torch.tensor(LOW, dtype=torch.float64),
        log_clip_high=torch.tensor(HIGH, dtype=torch.float64),
    )


def maximised(old: Tensor, advantages: Tensor, alpha: float) -> Tensor:
    """log pi after many small steps on the exact objective of CPGD; [bandits, arms]."""
    logits = old.clone()
    for _ in range(100):
        live = logits.log_softmax(-1)
        weighted = old.exp() * force(live - old, advantages, alpha)
        logits = logits - 0.3 * (weighted - live.exp() * weighted.sum(-1, keepdim=True))
    return logits.log_softmax(-1)


def five_bandits() -> tuple[Tensor, Tensor]:
    """log pi and rewards in [0, 1], two of them 0 or 1 only; [5, 6]."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(5, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards = torch.rand(5, 6, generator=generator, dtype=torch.float64)
    return policy, torch.cat([rewards[:3], rewards[3:].round()])


def test_the_return_grows_by_at_least_alpha_times_the_divergence_without_a_baseline():
    # Theorem 1, whose proof needs rewards >= 0 as advantages
    (old, rewards), alpha = five_bandits(), 0.05
    first = old
    for _ in range(20):
        new = maximised(old, rewards, alpha)
        gain = ((new.exp() - old.exp()) * rewards).sum(-1)
        divergence = (old.exp() * (old - new)).sum(-1)
        assert (divergence > 0).all() and (gain >= alpha * divergence).all()
        old = new
    assert ((old.exp() - first.exp()) * rewards).sum(-1).min() > 0.1


def test_with_the_mean_as_baseline_a_maximised_objective_still_does_not_lower_the_return():
    (old, rewards), alpha = five_bandits(), 0.05
    for _ in range(20):
        mean = (old.exp() * rewards).sum(-1, keepdim=True)
        new = maximised(old, rewards - mean, alpha)
        assert (((new.exp() - old.exp()) * rewards).sum(-1) > 0).all()
        old = new


def test_with_the_mean_as_baseline_a_better_objective_can_have_a_worse_return():
    # "L(theta') >= L(theta) implies a better return" needs advantages >= 0. Rewards 1, .5, 0:
    old = torch.tensor([0.30, 0.65, 0.05], dtype=torch.float64).log()  # return .625
    new = torch.tensor([0.35, 0.50, 0.15], dtype=torch.float64).log()  # return .6
    rewards = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)

    def improvement(advantages: Tensor) -> float:
        phi = -log_ratio_term(token_inputs(new - old, advantages)).value
        return (old.exp() * (phi - 0.01 * (old - new))).sum().item()

    assert improvement(rewards - 0.625) > 4e-4
    assert improvement(rewards) < -0.03
