"""What the loss reads per token, worked by hand for two groups."""

import math

import pytest
import torch

from megatron_cpgd.algorithm.loss_sequences import (
    bears_loss,
    build_loss_sequences,
    mask_metrics,
    set_epoch_weights,
    without_loss,
)
from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.algorithm.sequences import one_rank_sequences
from megatron_cpgd.config.algorithm import (
    AlgorithmConfig,
    ConstantClip,
    DriftConfig,
    NoClip,
    TightToLooseClip,
)
from megatron_cpgd.types import TrainSequence


def sequence(
    group: int, tokens: int, advantage: float = 1.0, truncated: bool = False
) -> TrainSequence:
    return TrainSequence(
        group=group,
        prompt_ids=torch.tensor([5, 6, 7]),
        response_ids=torch.arange(10, 10 + tokens),
        rollout_logprobs=torch.zeros(tokens),
        advantage=advantage,
        truncated=truncated,
        old_logprobs=-torch.arange(1.0, tokens + 1),
    )


def build(sequences, **settings):
    return build_loss_sequences(sequences, AlgorithmConfig(**settings))


def coefficients(sequences) -> list[list[float]]:
    return [s.tensors["coefficients"].tolist() for s in build(sequences)]


# Two prompts. Group 4 has 1 + 3 tokens: 1 / (2 * 4). Group 9 has 2 + 0: 1 / (2 * 2).
def test_a_token_weighs_one_over_prompts_times_tokens_of_its_group():
    batch = [sequence(4, 1), sequence(9, 2), sequence(4, 3), sequence(9, 0)]
    assert coefficients(batch) == [[0.125], [0.25, 0.25], [0.125] * 3, []]


def test_the_coefficients_of_a_group_sum_to_one_over_the_prompts():
    batch = [sequence(g, n) for g, n in ((0, 3), (0, 4), (1, 1), (2, 5))]
    totals = {0: 0.0, 1: 0.0, 2: 0.0}
    for each, values in zip(batch, coefficients(batch), strict=True):
        totals[each.group] += sum(values)
    assert list(totals.values()) == pytest.approx([1 / 3] * 3)


# The empty group still counts as a prompt: 1 / (2 * 2).
def test_a_group_without_any_token_counts_as_a_prompt_and_divides_nothing_by_zero():
    batch = [sequence(0, 2), sequence(1, 0), sequence(1, 0)]
    assert coefficients(batch) == [[0.25, 0.25], [], []]
    assert coefficients([sequence(0, 0), sequence(1, 0)]) == [[], []]


MASK = {"filter": {"truncated": "mask"}}


# Two prompts of 1 + 3 and 2 + 2 tokens: 1 / (2 * 4) each, also where a response is masked.
@pytest.mark.parametrize("truncated", [False, True])
def test_a_masked_response_has_no_coefficient_and_stays_in_all_denominators(truncated):
    batch = [sequence(0, 1), sequence(0, 3, truncated=truncated), sequence(1, 2), sequence(1, 2)]
    config = AlgorithmConfig.model_validate(MASK)
    built = [s.tensors["coefficients"].tolist() for s in build_loss_sequences(batch, config)]
    assert built == [[0.125], [0.0 if truncated else 0.125] * 3, [0.125] * 2, [0.125] * 2]
    assert coefficients(batch) == [[0.125], [0.125] * 3, [0.125] * 2, [0.125] * 2]


def test_a_masked_response_has_no_reference_term_either():
    config = AlgorithmConfig.model_validate(MASK | {"reference": {"coef": 0.1}})
    batch = [sequence(0, 2, truncated=True), sequence(0, 2)]
    for each in batch:
        each.ref_logprobs = torch.zeros(2)
    built = build_loss_sequences(batch, config)
    assert [s.tensors["ref_coefficients"].tolist() for s in built] == [[0.0] * 2, [0.25] * 2]


# log rho = ln 2, ln 4 and, masked, ln 8: the mean weight is (2 + 4) / 2 = 3, not 14 / 3.
def test_the_mean_weight_of_a_correction_is_that_of_the_responses_with_loss():
    correction = {"type": "truncate", "high": 100.0, "normalise": True}
    config = AlgorithmConfig.model_validate(MASK | {"correction": correction})
    batch = [sequence(0, 1), sequence(0, 1, truncated=True), sequence(0, 1)]
    for each, rho in zip(batch, (2.0, 8.0, 4.0), strict=True):
        each.old_logprobs = torch.tensor([math.log(rho)])
    built = [s.tensors["coefficients"].item() for s in build_loss_sequences(batch, config)]
    assert built == pytest.approx([2 / 3 / 3, 0.0, 4 / 3 / 3])


def test_only_a_response_with_tokens_that_is_not_masked_bears_loss():
    mask, keep = AlgorithmConfig.model_validate(MASK), AlgorithmConfig()
    batch = [sequence(0, 2), sequence(0, 2, truncated=True), sequence(0, 0)]
    assert [bears_loss(each, mask) for each in batch] == [True, False, False]
    assert [bears_loss(each, keep) for each in batch] == [True, True, False]
    assert mask_metrics(batch, mask) == {"rollout/masked_truncated_frac": 1 / 3}
    assert mask_metrics(batch, keep) == mask_metrics([], mask) == {}


def test_input_advantage_and_old_logprobs_are_those_of_the_sequence():
    [built] = build([sequence(0, 2, advantage=-1.5)])
    assert built.input_ids.tolist() == [5, 6, 7, 10, 11]
    assert (built.prompt_length, built.response_length) == (3, 2)
    assert built.tensors["advantages"].tolist() == [-1.5, -1.5]
    assert built.tensors["old_logprobs"].tolist() == [-1.0, -2.0]


def test_a_pass_for_logprobs_only_has_the_same_tokens_and_no_tensors():
    [plain] = without_loss([sequence(0, 2)])
    assert plain.input_ids.tolist() == [5, 6, 7, 10, 11]
    assert plain.prompt_length == 3 and plain.tensors == {}


def test_a_constant_clip_is_the_same_for_every_token():
    [built] = build([sequence(0, 3)], clip=ConstantClip(low=0.2, high=0.5))
    assert built.tensors["log_clip_low"].tolist() == pytest.approx([math.log(0.8)] * 3)
    assert built.tensors["log_clip_high"].tolist() == pytest.approx([math.log(1.5)] * 3)


# lambda = 0.5, 4 tokens: eps * (0.5 + 0.5 * i / 4) = eps * (0.625, 0.75, 0.875, 1).
def test_a_tight_to_loose_clip_opens_over_each_response():
    clip = TightToLooseClip(type="tight_to_loose", low=0.4, high=0.8, start=0.5)
    four, one = build([sequence(0, 4), sequence(0, 1)], clip=clip)
    low = [math.log(1 - eps) for eps in (0.25, 0.3, 0.35, 0.4)]
    high = [math.log(1 + eps) for eps in (0.5, 0.6, 0.7, 0.8)]
    assert four.tensors["log_clip_low"].tolist() == pytest.approx(low)
    assert four.tensors["log_clip_high"].tolist() == pytest.approx(high)
    assert one.tensors["log_clip_low"].tolist() == pytest.approx([math.log(0.6)])


def test_without_a_clip_there_are_no_clip_tensors():
    [built] = build([sequence(0, 3)], clip=NoClip(type="none"))
    assert not {"log_clip_low", "log_clip_high"} & built.tensors.keys()


def test_old_logprobs_must_be_there():
    missing = sequence(0, 2)
    missing.old_logprobs = None
    with pytest.raises(AssertionError, match="compute the old log-probs first"):
        build([missing])


# old = ln(0.5). Ratios at the start of the epoch: 1.1 stays, 2 is cut to 1.3, 0.1 to 0.8.
def test_later_epochs_multiply_the_advantages_by_truncated_ratios():
    each = sequence(0, 3, advantage=-2.0)
    each.old_logprobs = torch.full((3,), math.log(0.5))
    now = each.old_logprobs + torch.tensor([1.1, 2.0, 0.1]).log()
    set_epoch_weights([each], [now], ConstantClip(low=0.2, high=0.3))
    assert each.epoch_weight.tolist() == pytest.approx([1.1, 1.3, 0.8])
    [built] = build([each])
    assert built.tensors["advantages"].tolist() == pytest.approx([-2.2, -2.6, -1.6])
    # Clip and drift keep comparing with pi_old.
    assert built.tensors["old_logprobs"].tolist() == each.old_logprobs.tolist()


def test_the_weight_of_an_epoch_replaces_that_of_the_one_before():
    each = sequence(0, 1)
    for ratio, weight in ((1.2, 1.2), (0.9, 0.9)):
        current = each.old_logprobs + math.log(ratio)
        set_epoch_weights([each], [current], ConstantClip())
        assert each.epoch_weight.tolist() == pytest.approx([weight])


# Two groups of one token, coefficient 1/2 each, ratio 1 (log-prob = old), drift weight r - 1 = 0.
# d loss / d logprob = -A / 2: -0.5 and 1.0.
def test_the_gradient_at_ratio_one_is_minus_advantage_times_coefficient():
    built = build([sequence(0, 1, advantage=1.0), sequence(1, 1, advantage=-2.0)])
    tensors = {name: torch.cat([each.tensors[name] for each in built]) for name in built[0].tensors}
    logprobs = tensors["old_logprobs"].clone().requires_grad_()
    objective = build_objective(AlgorithmConfig(drift=DriftConfig(coef=0.1)))
    tokens = tensors | {"loss_mask": torch.tensor([True, True])}
    responses = one_rank_sequences(torch.tensor([0, 1]))
    loss, _ = objective.evaluate(logprobs, torch.zeros(2), tokens, responses)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.5, 1.0])


# Ranks without a token hand in nothing; the reduction must still be called, once per tensor.
def test_reduce_adds_the_parts_and_calls_every_collective_without_any():
    built = build([sequence(0, 2), sequence(0, 2)])
    objective = build_objective(AlgorithmConfig())
    parts = []
    for each in built:
        tokens = each.tensors | {"loss_mask": torch.tensor([True, True])}
        current = each.tensors["old_logprobs"] + math.log(1.1)
        responses = one_rank_sequences(torch.tensor([0, 0]))
        entropy = torch.full((2,), 0.75)
        parts.append(objective.evaluate(current, entropy, tokens, responses)[1])
    calls = []
    metrics = objective.reduce(parts, lambda tensor, op: calls.append(op))
    assert metrics["policy/ratio_mean"] == pytest.approx(1.1, rel=1e-5)
    assert metrics["policy/entropy"] == pytest.approx(0.75)
    assert objective.reduce([], lambda tensor, op: calls.append(op)) == {"policy/loss": 0.0}
    assert calls == [torch.distributed.ReduceOp.SUM, torch.distributed.ReduceOp.MAX] * 2
