import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.algorithm.advantages import compute_advantages
from megatron_cpgd.algorithm.aggregation import response_coefficients
from megatron_cpgd.algorithm.coefficients import log_clip_bounds, truncated_epoch_weight
from megatron_cpgd.algorithm.cpgd import drift_weight, log_ratio_term
from megatron_cpgd.algorithm.objective import Objective
from megatron_cpgd.algorithm.sequences import one_rank_sequences
from megatron_cpgd.algorithm.surrogate import TokenInputs
from megatron_cpgd.config.algorithm import AlgorithmConfig

LOW, HIGH = torch.tensor(0.8).log(), torch.tensor(1.2).log()
ALPHA, CAP = 0.01, 2.0


def cpgd_loss(logprobs, *, drift_coef, drift_clip, mask, **tensors):
    """The loss of the objective `cpgd`; `tensors` as `build_loss_sequences` names them."""
    drift = {"coef": drift_coef, "gradient_clip": drift_clip}
    objective = Objective(config=AlgorithmConfig.model_validate({"drift": drift}))
    tokens = {name: x for name, x in tensors.items() if x is not None} | {"loss_mask": mask}
    index = torch.where(mask, 0, -1)
    loss, _ = objective.evaluate(
        logprobs, torch.zeros_like(logprobs), tokens, one_rank_sequences(index)
    )
    return loss


def gradient(
    ratio, advantages, *, coefficients=1.0, low=LOW, high=HIGH, drift_coef=ALPHA, drift_clip=CAP
):
    """dL / dlogp per token of `cpgd_loss` at the given ratios, all tokens in the mask, float64."""
    ratio = torch.as_tensor(ratio, dtype=torch.float64)
    old = torch.linspace(-3.0, -0.5, ratio.numel(), dtype=torch.float64).reshape(ratio.shape)
    logprobs = (old + ratio.log()).requires_grad_()
    cpgd_loss(
        logprobs,
        old_logprobs=old,
        advantages=torch.as_tensor(advantages, dtype=torch.float64).expand(ratio.shape),
        coefficients=torch.as_tensor(coefficients, dtype=torch.float64).expand(ratio.shape),
        mask=torch.ones_like(ratio, dtype=torch.bool),
        log_clip_low=low,
        log_clip_high=high,
        drift_coef=drift_coef,
        drift_clip=drift_clip,
    ).backward()
    return logprobs.grad


def random_batch(seed, shape=(40,), dtype=torch.float64):
    """Ratios around, beyond and far beyond the clip range; advantages of all signs and 0."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(shape, generator=generator, dtype=dtype)
    return {
        "logprobs": old + 0.6 * torch.randn(shape, generator=generator, dtype=dtype),
        "old_logprobs": old,
        "advantages": torch.randint(-2, 3, shape, generator=generator).to(dtype),
        "coefficients": torch.rand(shape, generator=generator, dtype=dtype),
        "mask": torch.rand(shape, generator=generator) < 0.7,
    }


def loss_and_gradient(batch):
    logprobs = batch["logprobs"].clone().requires_grad_()
    rest = {name: x for name, x in batch.items() if name != "logprobs"}
    bounds = {"log_clip_low": LOW, "log_clip_high": HIGH} | rest
    loss = cpgd_loss(logprobs, **bounds, drift_coef=0.1, drift_clip=CAP)
    loss.backward()
    return loss.detach(), logprobs.grad


# --- values and gradients worked by hand ---------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "phi"),
    [
        (1.1, 2.0, 2 * math.log(1.1)),  # inside
        (1.5, 2.0, 2 * math.log(1.2)),  # above, A > 0: the bound is the smaller one
        (0.5, 2.0, 2 * math.log(0.5)),  # below, A > 0: ln .5 * 2 < ln .8 * 2
        (0.9, -2.0, -2 * math.log(0.9)),  # inside
        (0.5, -2.0, -2 * math.log(0.8)),  # below, A < 0: -2 ln .8 = .45 < -2 ln .5 = 1.39
        (1.5, -2.0, -2 * math.log(1.5)),  # above, A < 0: -.81 < -.36
        (1.5, 0.0, 0.0),
    ],
)
def test_policy_term_is_the_smaller_of_the_two_products(ratio, advantage, phi):
    old = torch.tensor([-1.0])
    term = log_ratio_term(
        TokenInputs(
            logprobs=old + math.log(ratio),
            old_logprobs=old,
            advantages=torch.tensor([advantage]),
            log_clip_low=LOW,
            log_clip_high=HIGH,
        )
    )
    assert term.value.item() == pytest.approx(-phi, abs=1e-6)


@pytest.mark.parametrize(("ratio", "weight"), [(1.5, 0.5), (0.5, -0.5), (3.0, 2.0), (5.0, 2.0)])
def test_drift_term_is_the_capped_ratio_difference_times_the_logprob(ratio, weight):
    # c = 2: the weight r - 1 stops growing at r = 3
    assert drift_weight(torch.tensor(ratio).log(), 2.0).item() == pytest.approx(weight)
    logprobs = torch.tensor([-0.5])
    one = torch.ones(1)
    loss = cpgd_loss(
        logprobs, old_logprobs=logprobs - math.log(ratio), advantages=0 * one, coefficients=one,
        mask=one > 0, drift_coef=1.0, drift_clip=2.0,
    )  # fmt: skip
    assert loss.item() == pytest.approx(weight * -0.5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),  # -A
        (1.1, 2.0, -2.0 + 0.001),  # inside: -A + .01 * .1
        (1.5, 2.0, 0.005),  # clipped: .01 * .5
        (0.5, 2.0, -2.0 - 0.005),  # wrong side for a clip: the drift helps to come back
        (0.5, -2.0, -0.005),  # clipped: .01 * -.5
        (1.5, -2.0, 2.0 + 0.005),
        (9.0, -2.0, 2.0 + 0.02),  # drift capped: .01 * 2, and no factor 9 on A
        (1.5, 0.0, 0.005),  # no advantage: drift only
        (4.0, 0.0, 0.02),
    ],
)
def test_gradient_of_a_token(ratio, advantage, expected):
    assert gradient([ratio], advantage).item() == pytest.approx(expected, rel=1e-9)


def test_clipped_token_keeps_only_the_drift_gradient():
    # ratio 1.5 > 1.2, A = +2: policy 0, drift .01 * .5; coefficient 1/4
    assert gradient([1.5], 2.0, coefficients=0.25).item() == pytest.approx(0.00125)


@pytest.mark.parametrize("bound_dims", [0, 1])
def test_a_log_ratio_exactly_at_the_bound_is_inside(bound_dims):
    # old = 0 makes the log-ratio equal the bound bit by bit; a minimum would give half of A
    low, high = (x.expand(1) if bound_dims else x for x in (LOW, HIGH))
    for bound, advantage in ((HIGH, 2.0), (LOW, -2.0)):
        logprobs = bound.reshape(1).clone().requires_grad_()
        cpgd_loss(
            logprobs,
            old_logprobs=torch.zeros(1),
            advantages=torch.tensor([advantage]),
            coefficients=torch.ones(1),
            mask=torch.ones(1, dtype=torch.bool),
            log_clip_low=low,
            log_clip_high=high,
            drift_coef=0.0,
            drift_clip=CAP,
        ).backward()
        assert logprobs.grad.item() == -advantage


def test_products_that_round_to_one_number_do_not_split_the_gradient():
    # One float32 step above the bound; A is so small that l * A and bound * A are the same number.
    logprobs = torch.nextafter(HIGH, torch.tensor(1.0)).reshape(1)
    advantages = torch.tensor([1e-44])
    assert (logprobs * advantages).item() == (HIGH * advantages).item() > 0
    term = log_ratio_term(
        TokenInputs(
            logprobs=logprobs,
            old_logprobs=torch.zeros(1),
            advantages=advantages,
            log_clip_low=LOW,
            log_clip_high=HIGH,
        )
    )
    assert term.force.item() == 0.0


def test_tight_to_loose_clips_the_same_ratio_early_but_not_late():
    # eps 0.2, start 0.5, T = 4: upper bounds 1.125, 1.15, 1.175, 1.2; ratio 1.16 and A = 1
    low, high = log_clip_bounds(4, low=0.2, high=0.2, start=0.5)
    result = gradient([1.16] * 4, 1.0, low=low, high=high, drift_coef=0.0)
    assert result.tolist() == [0.0, 0.0, -1.0, -1.0]


def test_tight_to_loose_clips_the_same_ratio_early_but_not_late_on_the_lower_side():
    # lower bounds 0.875, 0.85, 0.825, 0.8; ratio 0.84 and A = -1
    low, high = log_clip_bounds(4, low=0.2, high=0.2, start=0.5)
    result = gradient([0.84] * 4, -1.0, low=low, high=high, drift_coef=0.0)
    assert result.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_epoch_weight_scales_the_policy_gradient_and_not_the_drift():
    # epoch started at ratio 2, cut to 1.2; live ratio 1.1, A = 2: -2.4 + .01 * .1
    weight = truncated_epoch_weight(
        torch.tensor([math.log(2.0)]), torch.zeros(1), low=0.2, high=0.2
    )
    assert gradient([1.1], 2.0 * weight.item()).item() == pytest.approx(-2.399)


def test_loss_value_is_the_plain_weighted_sum():
    # Eq. 2 by hand. Two prompts, two responses each, rewards (1, 0) and (1, 1), equal weight:
    # A = (+.5, -.5), (0, 0). Lengths (1, 2), (1, 0): c = 1/(2*3) = 1/6 and 1/(2*1) = 1/2.
    # Ratios 1.5 | 1.1, 0.5 | 2.0 and log pi_theta = -1 everywhere, alpha = .1, c = 2.
    # Phi: .5 ln 1.2; -.5 ln 1.1, -.5 ln .8; 0.   E: -.5; -.1, +.5; -1.
    lengths = torch.tensor([[1, 2], [1, 0]])
    advantages = compute_advantages(
        torch.tensor([[1.0, 0.0], [1.0, 1.0]]), prompt_weight="equal", max_weight=3.0
    ).values
    coefficients = response_coefficients(
        lengths.flatten(), torch.tensor([0, 0, 1, 1]), "group_token_mean"
    )
    logprobs = torch.full((4,), -1.0)
    loss = cpgd_loss(
        logprobs,
        old_logprobs=logprobs - torch.tensor([1.5, 1.1, 0.5, 2.0]).log(),
        advantages=advantages.flatten().repeat_interleave(lengths.flatten()),
        coefficients=coefficients.repeat_interleave(lengths.flatten()),
        mask=torch.ones(4, dtype=torch.bool),
        log_clip_low=LOW,
        log_clip_high=HIGH,
        drift_coef=0.1,
        drift_clip=2.0,
    )
    phi = 0.5 * (math.log(1.2) - math.log(1.1) - math.log(0.8))
    drift = 0.1 * (-0.5 - 0.1 + 0.5)
    expected = -(phi - drift) / 6 + 0.1 * -1.0 / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# --- closed form and equivalences ----------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.floats(0.1, 3.0))
def test_gradient_equals_the_closed_form(seed, alpha, cap):
    batch = random_batch(seed)
    ratio, a = (batch["logprobs"] - batch["old_logprobs"]).exp(), batch["advantages"]
    mask = ~(((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8)))
    expected = batch["coefficients"] * (-a * mask + alpha * (ratio - 1).clamp(max=cap))
    low, high = torch.tensor([0.8, 1.2], dtype=torch.float64).log()
    actual = gradient(
        ratio,
        a,
        coefficients=batch["coefficients"],
        low=low,
        high=high,
        drift_coef=alpha,
        drift_clip=cap,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def ppo_gradient(ratio, advantage):
    """PPO-clip, written as in its paper and differentiated at the given ratio."""
    logprobs = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    r = logprobs.exp()
    loss = -torch.minimum(r * advantage, r.clamp(0.8, 1.2) * advantage)
    return torch.autograd.grad(loss, logprobs)[0].item()


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 7.0])
def test_cpg_gradient_is_ppos_without_the_factor_ratio(ratio, advantage):
    cpg = gradient([ratio], advantage, drift_coef=0.0).item()
    assert cpg * ratio == pytest.approx(ppo_gradient(ratio, advantage))


def test_all_methods_have_the_same_gradient_at_ratio_one():
    advantages = [1.5, -0.5, 0.0, 2.0]
    ratio = [1.0] * 4
    expected = torch.tensor([-1.5, 0.5, 0.0, -2.0], dtype=torch.float64)
    for clip in ({}, {"low": None, "high": None}):
        for drift_coef in (0.0, ALPHA):
            result = gradient(ratio, advantages, drift_coef=drift_coef, **clip)
            torch.testing.assert_close(result, expected)


def test_without_drift_a_clipped_token_has_no_gradient_at_all():
    assert gradient([1.5, 0.5], [1.0, -1.0], drift_coef=0.0).tolist() == [0.0, 0.0]


def test_without_clip_the_policy_gradient_is_minus_the_advantage_everywhere():
    ratio, advantages = [0.1, 0.1, 8.0, 8.0], [1.0, -1.0, 1.0, -1.0]
    free = {"low": None, "high": None}
    assert gradient(ratio, advantages, drift_coef=0.0, **free).tolist() == [-1.0, 1.0, -1.0, 1.0]
    # PGD: drift weights -.9 and the cap 2
    expected = [-1.009, 0.991, -0.98, 1.02]
    assert gradient(ratio, advantages, **free).tolist() == pytest.approx(expected)


def test_each_bound_can_be_left_out_alone():
    # both tokens are clipped if both bounds are there
    ratio, advantages = [8.0, 0.1], [1.0, -1.0]
    assert gradient(ratio, advantages, high=None, drift_coef=0.0).tolist() == [-1.0, 0.0]
    assert gradient(ratio, advantages, low=None, drift_coef=0.0).tolist() == [0.0, 1.0]


# --- masks, splits, numbers at the edge ----------------------------------------------------------


@pytest.mark.parametrize("junk", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize(
    "name",
    ["logprobs", "old_logprobs", "advantages", "coefficients", "log_clip_low", "log_clip_high"],
)
def test_junk_outside_the_mask_changes_nothing(name, junk):
    batch = random_batch(0) | {"log_clip_low": LOW.expand(40), "log_clip_high": HIGH.expand(40)}
    loss, grad = loss_and_gradient(batch)
    junked = batch | {name: torch.where(batch["mask"], batch[name], junk)}
    junk_loss, junk_grad = loss_and_gradient(junked)
    assert junk_loss == loss
    assert torch.equal(junk_grad, grad)
    assert (grad[~batch["mask"]] == 0).all() and (grad[batch["mask"]] != 0).any()


def test_junk_in_all_tensors_at_once_changes_nothing():
    batch = random_batch(1)
    loss, grad = loss_and_gradient(batch)
    junked = {
        name: x if name == "mask" else torch.where(batch["mask"], x, math.nan)
        for name, x in batch.items()
    }
    junk_loss, junk_grad = loss_and_gradient(junked)
    assert junk_loss == loss
    assert torch.equal(junk_grad, grad)


@pytest.mark.parametrize("size", [3, 0])
def test_a_micro_batch_without_tokens_gives_a_zero_that_has_a_gradient(size):
    batch = {name: torch.full((size,), math.nan) for name in random_batch(0)}
    loss, grad = loss_and_gradient(batch | {"mask": torch.zeros(size, dtype=torch.bool)})
    assert loss.item() == 0.0
    assert grad.tolist() == [0.0] * size


def test_a_bad_number_inside_the_mask_is_not_hidden():
    batch = random_batch(0) | {"mask": torch.ones(40, dtype=torch.bool)}
    batch["logprobs"][3] = math.nan
    assert loss_and_gradient(batch)[0].isnan()


@pytest.mark.parametrize(("log_ratio", "weight"), [(200.0, math.expm1(20.0)), (-200.0, -1.0)])
def test_an_extreme_log_ratio_gives_a_finite_drift_even_without_cap(log_ratio, weight):
    # e^200 is inf in float32; the log-ratio is cut at 20
    assert drift_weight(torch.tensor([log_ratio]), math.inf).item() == pytest.approx(weight)


def test_the_drift_of_a_tiny_step_keeps_its_digits_in_float32():
    # exp(l) - 1 has a resolution of 6e-8 near 1 and would give 5.96e-8 or 1.19e-7 here
    assert drift_weight(torch.tensor([1e-7]), CAP).item() / 1e-7 == pytest.approx(1.0, rel=1e-5)


def test_only_the_live_logprobs_receive_a_gradient():
    batch = random_batch(0)
    for name in ("old_logprobs", "advantages", "coefficients"):
        batch[name].requires_grad_()
    loss_and_gradient(batch)
    assert all(batch[n].grad is None for n in ("old_logprobs", "advantages", "coefficients"))


@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_the_order_of_tokens_does_not_matter(seed, random):
    batch = random_batch(seed)
    order = list(range(40))
    random.shuffle(order)
    loss, grad = loss_and_gradient(batch)
    permuted_loss, permuted_grad = loss_and_gradient({n: x[order] for n, x in batch.items()})
    torch.testing.assert_close(permuted_loss, loss, rtol=1e-12, atol=1e-12)
    assert torch.equal(permuted_grad, grad[order])


@given(st.integers(0, 10_000), st.lists(st.integers(0, 40), max_size=5))
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(seed, cuts):
    batch = random_batch(seed)
    bounds = [0, *sorted(cuts), 40]
    parts = [
        loss_and_gradient({name: x[start:stop] for name, x in batch.items()})
        for start, stop in pairwise(bounds)
    ]
    loss, grad = loss_and_gradient(batch)
    split_loss = torch.stack([part[0] for part in parts]).sum()
    torch.testing.assert_close(split_loss, loss, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat([part[1] for part in parts]), grad)


def test_padded_rows_give_the_loss_of_the_packed_tokens():
    packed = random_batch(3) | {"mask": torch.ones(40, dtype=torch.bool)}
    lengths = [15, 0, 25]
    padded = {
        name: torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)
        for name, x in packed.items()
    }
    loss, grad = loss_and_gradient(packed)
    padded_loss, padded_grad = loss_and_gradient(padded)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=1e-12)
    assert torch.equal(padded_grad[padded["mask"]], grad)


# --- the paper's claims about a token; test_theory.py has those about a policy -------------------


def test_a_token_far_above_the_cap_is_pushed_back_down():
    # G > 0: minimising lowers log pi. r = 5 > 1 + c = 3, A = 0: G = alpha * c
    assert gradient([5.0], 0.0).item() == pytest.approx(ALPHA * CAP)


def test_capping_the_estimator_instead_of_its_gradient_would_push_the_ratio_up():
    # k3 = r - 1 - l with r - 1 cut at 2: at r = 5 only -l is left, gradient -1 (ours: +2)
    logprobs = torch.tensor([math.log(5.0)], requires_grad=True)
    ((logprobs.exp() - 1).clamp(max=2.0) - logprobs).sum().backward()
    assert logprobs.grad.item() == -1.0
    ours = gradient([5.0], 0.0, drift_coef=1.0).item()
    assert ours == pytest.approx(2.0)


def test_k1_pushes_the_same_everywhere_where_the_drift_gives_feedback():
    # k1 = -l has the gradient -1 at any ratio; the drift's r - 1 changes its sign at r = 1
    logprobs = torch.tensor([0.5, 1.0, 2.0]).log().requires_grad_()
    (-logprobs).sum().backward()
    assert logprobs.grad.tolist() == [-1.0, -1.0, -1.0]
    assert gradient([0.5, 1.0, 2.0], 0.0, drift_coef=1.0).tolist() == pytest.approx([-0.5, 0, 1.0])


def test_a_large_ratio_with_a_negative_advantage_does_not_enlarge_the_step():
    # r = 10, A = -1: PPO's gradient is 10, CPGD's |A| + alpha * c = 1.02
    assert ppo_gradient(10.0, -1.0) == pytest.approx(10.0)
    assert gradient([10.0], -1.0).item() == pytest.approx(1.02)
