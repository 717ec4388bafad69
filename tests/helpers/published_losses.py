"""Batches of responses, and the published loss of every preset on them.

A formula takes the log-probs twice: `live` carries the gradient, `fixed` has the same numbers and
stands wherever the publication has a stop-gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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
