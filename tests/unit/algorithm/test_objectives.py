"""Every preset against its published formula, written down here once more and differentiated.

A formula below takes the log-probs twice: `live` carries the gradient, `fixed` has the same numbers
and stands wherever the publication has a stop-gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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

quick = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Batch:
    """P groups of G responses, flat, response after response."""

    rewards: Tensor
    old: list[Tensor]
    rollout: list[Tensor]
    live: list[Tensor]
    ref: list[Tensor]

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(x) for x in self.old]).view(self.rewards.shape)


def make_batch(lengths, rewards, *, seed, staleness=0.3, mismatch=0.3) -> Batch:
    """Ratios on both sides of every bound; float32 numbers, so that no rounding comes later."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float, n: int) -> Tensor:
        return scale * torch.randn(n, generator=generator)

    old = [-0.1 - 2 * torch.rand(n, generator=generator) for n in lengths]
    return Batch(
        rewards=torch.tensor(rewards),
        old=old,
        rollout=[x + noise(mismatch, len(x)) for x in old],
        live=[x + noise(staleness, len(x)) for x in old],
        ref=[x + noise(staleness, len(x)) for x in old],
    )


# Uneven lengths, an empty response, a group of equal rewards; a group of one token; ratios past
# every cap.
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


@dataclass
class Response:
    """What a formula sees of one response."""

    live: Tensor
    fixed: Tensor
    old: Tensor
    rollout: Tensor
    ref: Tensor
    A: Tensor
    bapo_range: tuple[float, float]

    @property
    def ratio(self) -> Tensor:
        return (self.live - self.old).exp()

    @property
    def fixed_ratio(self) -> Tensor:
        return (self.fixed - self.old).exp()


def centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean(dim=1, keepdim=True)


def standardised(rewards: Tensor, lengths: Tensor) -> Tensor:
    rows = [(r - r.mean()) / r.std() if r.std() > 0 else 0 * r for r in rewards.double()]
    return torch.stack(rows)


def leave_one_out(rewards: Tensor, lengths: Tensor) -> Tensor:
    others = rewards.sum(dim=1, keepdim=True) - rewards
    return (rewards - others / (rewards.shape[1] - 1)).double()


def only_centred(rewards: Tensor, lengths: Tensor) -> Tensor:
    return centred(rewards.double())


def whitened(values: Tensor, lengths: Tensor) -> Tensor:
    tokens = torch.cat([a.expand(n) for a, n in zip(values.flatten(), lengths.flatten(),
                                                    strict=True)])  # fmt: skip
    return (values - tokens.mean()) / (tokens.var() + 1e-8).sqrt()


def gpg_scaled(rewards: Tensor, lengths: Tensor) -> Tensor:
    equal = sum(r.numel() for r in rewards if r.std() == 0)
    return centred(rewards.double()) * rewards.numel() / (rewards.numel() - equal)


def group_token_mean(tokens: list[Tensor], groups: int) -> Tensor:
    size = len(tokens) // groups
    rows = [torch.cat(tokens[i * size : (i + 1) * size]) for i in range(groups)]
    return sum(row.sum() / max(1, len(row)) for row in rows) / groups


def token_mean(tokens: list[Tensor], groups: int) -> Tensor:
    return torch.cat(tokens).mean()


def response_mean(tokens: list[Tensor], groups: int) -> Tensor:
    return torch.stack([x.mean() for x in tokens if len(x)]).mean()


def response_sum(tokens: list[Tensor], groups: int) -> Tensor:
    return torch.stack([x.sum() for x in tokens if len(x)]).mean()


def over_4096(tokens: list[Tensor], groups: int) -> Tensor:
    return response_sum(tokens, groups) / 4096


def drift(x: Response) -> Tensor:
    return 0.01 * torch.minimum(x.fixed_ratio - 1, torch.tensor(2.0)) * x.live


def cpg(x: Response) -> Tensor:
    log_ratio = x.live - x.old
    return torch.minimum(log_ratio * x.A, log_ratio.clamp(math.log(0.8), math.log(1.2)) * x.A)


def cpgd_authors(x: Response) -> Tensor:
    clipped = torch.where(
        x.A > 0,
        x.live.clamp(max=math.log(1.2) + x.old),
        x.live.clamp(min=math.log(0.8) + x.old),
    )
    return clipped * x.A - drift(x) - x.A * x.old  # the last one is the constant they leave out


def ppo(low: float, high: float) -> Callable[[Response], Tensor]:
    return lambda x: torch.minimum(x.ratio * x.A, x.ratio.clamp(1 - low, 1 + high) * x.A)


def dual_clip(x: Response) -> Tensor:
    inner = ppo(0.2, 0.2)(x)
    return torch.where(x.A < 0, torch.maximum(inner, 3.0 * x.A), inner)


def k3(x: Response) -> Tensor:
    q = x.ref - x.live
    return q.exp() - q - 1


def gspo(low: float, high: float) -> Callable[[Response], Tensor]:
    def objective(x: Response) -> Tensor:
        s = (x.live - x.old).mean().exp() if len(x.live) else x.live.sum()
        return torch.minimum(s * x.A, s.clamp(1 - low, 1 + high) * x.A).expand(len(x.live))

    return objective


def gmpo(x: Response) -> Tensor:
    sign, log_ratio = x.A.sign(), x.live - x.old
    z = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-0.4, 0.4))
    # Where A = 0 the sign makes z = 0; the product with A is 0 as well.
    return (z.mean().exp() * x.A).expand(len(z)) if len(z) else z


def sapo(x: Response) -> Tensor:
    tau = torch.where(x.A > 0, 1.0, torch.tensor(1.05, dtype=torch.float64))
    return 4 / tau * torch.sigmoid(tau * (x.ratio - 1)) * x.A


def minirl(x: Response) -> Tensor:
    r = x.fixed_ratio
    clipped = ((x.A > 0) & (r > 1.27)) | ((x.A < 0) & (r < 0.8))
    return ~clipped * (x.fixed - x.rollout).exp().clamp(max=5.0) * x.A * x.live


def vespo(x: Response) -> Tensor:
    w = (x.fixed - x.old).sum().exp()
    k, decay = (2.0, 3.0) if x.A >= 0 else (3.0, 2.0)
    return w**k * torch.exp(decay * (1 - w)) * x.A * x.live


def minpro(x: Response) -> Tensor:
    least = [min(x.fixed_ratio[:t].tolist(), default=1.0) for t in range(len(x.live))]
    r = torch.tensor(least, dtype=torch.float64) * x.ratio
    return torch.minimum(r * x.A, r.clamp(0.8, 1.28) * x.A)


def dppo(x: Response) -> Tensor:
    change = x.fixed.exp() - x.old.exp()
    masked = ((x.A > 0) & (change > 0.2)) | ((x.A < 0) & (change < -0.2))
    return x.fixed_ratio.clamp(max=20.0) * ~masked * x.A * x.live


def bapo(x: Response) -> Tensor:
    low, high = x.bapo_range
    return torch.minimum(x.ratio * x.A, x.ratio.clamp(low, high) * x.A)


def find_bapo_range(batch: Batch, live: list[Tensor], advantages: Tensor) -> tuple[float, float]:
    """Algorithm 1 line by line, in hundredths: a- = 60, b- = 90, a+ = 120, b+ = 300."""
    low, high = 60, 120

    def contribution() -> float:
        tokens = [
            (math.exp(p) * min(max(math.exp(q - p), low / 100), high / 100) * a.item(),
             math.exp(q) * a.item())
            for old, new, a in zip(batch.old, live, advantages, strict=True)
            for p, q in zip(old.tolist(), new.tolist(), strict=True)
        ]  # fmt: skip
        least = [min(pair) for pair in tokens]
        return sum(x for x in least if x > 0) / sum(map(abs, least))

    while contribution() < 0.4 and low + 2 <= 90:
        if high + 5 <= 300:
            high += 5
        else:
            low += 2
    return low / 100, high / 100


def cpgd_tis(x: Response) -> Tensor:
    rho = (x.old - x.rollout).exp()
    keep = bool((rho >= 1e-4).all())
    return keep * rho.clamp(max=2.0) * (cpg(x) - drift(x))


FORMULAS = {
    "cpgd": (standardised, lambda x: cpg(x) - drift(x), group_token_mean),
    "cpg": (standardised, cpg, group_token_mean),
    "pgd": (standardised, lambda x: (x.live - x.old) * x.A - drift(x), group_token_mean),
    "pg": (standardised, lambda x: (x.live - x.old) * x.A, group_token_mean),
    "cpgd_authors": (standardised, cpgd_authors, response_mean),
    "cpgd_tis": (standardised, cpgd_tis, group_token_mean),
    "ppo_clip": (standardised, ppo(0.2, 0.2), group_token_mean),
    "ppo_clip_drift": (standardised, lambda x: ppo(0.2, 0.2)(x) - drift(x), group_token_mean),
    "dual_clip": (standardised, dual_clip, group_token_mean),
    "grpo": (standardised, lambda x: ppo(0.2, 0.2)(x) - 0.04 * k3(x), response_mean),
    "grpo_no_clip": (standardised, lambda x: x.ratio * x.A, response_mean),
    "dr_grpo": (only_centred, ppo(0.2, 0.2), over_4096),
    "dapo": (standardised, ppo(0.2, 0.28), token_mean),
    "reinforce_pp": (lambda r, n: whitened(r.double(), n), ppo(0.2, 0.2), token_mean),
    "reinforce_pp_baseline": (
        lambda r, n: whitened(centred(r.double()), n), ppo(0.2, 0.2), token_mean,
    ),
    "rloo": (leave_one_out, lambda x: (x.live - x.old) * x.A, response_sum),
    "gpg": (gpg_scaled, lambda x: (x.live - x.old) * x.A, token_mean),
    "gspo": (standardised, gspo(3e-4, 4e-4), response_mean),
    "sampo": (only_centred, lambda x: gspo(3e-3, 4e-3)(x) - 0.005 * k3(x), response_mean),
    "cispo": (standardised, lambda x: x.fixed_ratio.clamp(max=5.0) * x.A * x.live, token_mean),
    "gmpo": (standardised, gmpo, response_mean),
    "sapo": (standardised, sapo, response_mean),
    "minirl": (only_centred, minirl, response_sum),
    "vespo": (standardised, vespo, token_mean),
    "minpro": (standardised, minpro, token_mean),
    "dppo_tv": (standardised, dppo, token_mean),
    "bapo": (standardised, bapo, response_mean),
}  # fmt: skip


def published_loss(name: str, batch: Batch, live: list[Tensor], fixed: list[Tensor]) -> Tensor:
    estimate, objective, aggregate = FORMULAS[name]
    advantages = estimate(batch.rewards, batch.lengths).flatten()
    bapo_range = find_bapo_range(batch, fixed, advantages) if name == "bapo" else (0, 0)
    tokens = [
        objective(Response(
            live=x, fixed=y, old=o.double(), rollout=m.double(), ref=f.double(), A=a,
            bapo_range=bapo_range,
        ))
        for x, y, o, m, f, a in zip(
            live, fixed, batch.old, batch.rollout, batch.ref, advantages, strict=True
        )
    ]  # fmt: skip
    return -aggregate(tokens, len(batch.rewards))


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
