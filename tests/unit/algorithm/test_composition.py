"""CPGD with a correction: which expectation each weight restores, with exact expectations.

One position, a vocabulary of six, three policies: mu samples, pi_old anchors, pi_theta is live. An
expectation over mu is the loss with the coefficients mu; in the logits of a softmax,
grad log pi_theta summed with weights w is w - pi_theta * sum(w).
"""

import pytest
import torch

from megatron_cpgd.algorithm.coefficients import truncated_epoch_weight
from megatron_cpgd.algorithm.correction import correction_weights
from megatron_cpgd.config.algorithm import RejectionConfig, TruncatedWeight
from tests.helpers.bandit import logit_gradient

EXACT = TruncatedWeight(type="truncate", high=1e6)


def policies(seed=0):
    """log mu, log pi_old, logits of pi_theta."""
    generator = torch.Generator().manual_seed(seed)
    logits = 0.7 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return logits[0].log_softmax(0), logits[1].log_softmax(0), logits[2]


def rho(old, rollout, correction=EXACT):
    return correction_weights([old - rollout], correction, RejectionConfig())[0].double()


@pytest.mark.parametrize("seed", range(5))
def test_the_weighted_drift_under_the_sampler_is_the_divergence_from_pi_old(seed):
    rollout, old, logits = policies(seed)
    drift = {"drift": {"coef": 1.0, "gradient_clip": 1e6}}
    zero = torch.zeros(6, dtype=torch.float64)
    # grad KL(pi_old || pi_theta) = pi_theta - pi_old
    expected = logits.softmax(0) - old.exp()
    weighted = logit_gradient(logits, old, rollout.exp() * rho(old, rollout), zero, **drift)
    torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=1e-7)
    plain = logit_gradient(logits, old, rollout.exp(), zero, **drift)
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(5))
def test_the_weighted_policy_term_is_that_of_samples_of_pi_old(seed):
    rollout, old, logits = policies(seed)
    advantages = torch.linspace(-1, 1, 6, dtype=torch.float64)
    cpg = {"preset": "cpg", "clip": {"type": "constant"}}
    under_old = logit_gradient(logits, old, old.exp(), advantages, **cpg)
    weights = rollout.exp() * rho(old, rollout)
    weighted = logit_gradient(logits, old, weights, advantages, **cpg)
    torch.testing.assert_close(weighted, under_old, rtol=1e-6, atol=1e-7)


def test_at_the_first_step_a_constant_advantage_moves_the_policy_only_without_the_weight():
    rollout, old, _ = policies()
    logits, one = old, torch.ones(6, dtype=torch.float64)
    pg = {"preset": "pg"}
    weighted = logit_gradient(logits, old, rollout.exp() * rho(old, rollout), one, **pg)
    assert weighted.abs().max() < 1e-6
    # -grad of sum mu log pi_theta = pi_theta - mu: towards the sampler; away from it for A < 0
    plain = logit_gradient(logits, old, rollout.exp(), one, **pg)
    torch.testing.assert_close(plain, old.exp() - rollout.exp())


@pytest.mark.parametrize("seed", range(5))
def test_later_a_constant_advantage_leaves_the_divergence_from_pi_old_as_in_cpgd(seed):
    rollout, old, logits = policies(seed)
    one = torch.ones(6, dtype=torch.float64)
    weights = rollout.exp() * rho(old, rollout)
    weighted = logit_gradient(logits, old, weights, one, preset="pg")
    expected = logits.softmax(0) - old.exp()
    torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=1e-7)
    # Without the weight it is the divergence from the sampler.
    plain = logit_gradient(logits, old, rollout.exp(), one, preset="pg")
    torch.testing.assert_close(plain, logits.softmax(0) - rollout.exp())


def test_with_the_weight_of_a_later_epoch_a_constant_advantage_moves_nothing():
    # E_mu[rho r grad log pi] = 0: the epoch starts at pi_theta, and no ratio is cut.
    rollout, old, logits = policies()
    start = logits.log_softmax(0)
    weights = rollout.exp() * rho(old, rollout)
    staleness = truncated_epoch_weight(start, old, low=1 - 1e-6, high=1e6)
    assert logit_gradient(logits, old, weights, staleness, preset="pg").abs().max() < 1e-6
    cut = truncated_epoch_weight(start, old, low=0.2, high=0.2)
    assert logit_gradient(logits, old, weights, cut, preset="pg").abs().max() > 1e-2


def test_an_anchor_at_the_sampler_would_clip_and_drift_before_any_update():
    far, old, _ = policies()
    rollout = (0.8 * old + 0.2 * far).log_softmax(0)
    zero = torch.zeros(6, dtype=torch.float64)
    drift = {"drift": {"coef": 1.0, "gradient_clip": 1e6}}
    # Live is pi_old. Anchored there, nothing is clipped and the drift rests ...
    advantages = torch.where(old > rollout, 1.0, -1.0).double()  # the sides where a clip acts
    weights = torch.ones(6, dtype=torch.float64)
    clip = {"preset": "cpg", "clip": {"type": "constant"}}
    free = logit_gradient(old, old, weights, advantages, preset="pg")
    torch.testing.assert_close(logit_gradient(old, old, weights, advantages, **clip), free)
    assert logit_gradient(old, old, old.exp(), zero, **drift).abs().max() < 1e-12
    # ... anchored at mu, some tokens are clipped and the drift pulls towards the sampler.
    outside = ((old - rollout).exp() > 1.2) | ((old - rollout).exp() < 0.8)
    expected = logit_gradient(old, old, weights, advantages * ~outside, preset="pg")
    clipped = logit_gradient(old, rollout, weights, advantages, **clip)
    torch.testing.assert_close(clipped, expected)
    assert 0 < outside.sum() < 6
    pulled = logit_gradient(old, rollout, rollout.exp(), zero, **drift)
    torch.testing.assert_close(pulled, old.exp() - rollout.exp())


def test_truncation_loses_at_most_the_mass_above_the_cap():
    rollout, old, _ = policies()
    cap = 1.2
    cut = rho(old, rollout, TruncatedWeight(type="truncate", high=cap))
    f = torch.linspace(-1, 1, 6, dtype=torch.float64)
    bias = (rollout.exp() * (rho(old, rollout) - cut) * f).sum().abs()
    bound = (rollout.exp() * (rho(old, rollout) - cap).clamp(min=0) * f.abs()).sum()
    assert 0 < bias <= bound
