"""What is logged about the tokens of an optimizer step, as totals that add up over micro-batches.

    statistics = merge_statistics([token_statistics(...) for each micro-batch])
    all_reduce(statistics.totals, SUM)         # by the caller, in place
    all_reduce(statistics.maxima, MAX)
    metrics = statistics.finish()

Quantiles do not add up, counts do: the log-ratios are counted in bins whose edges grow by 5 %, from
1e-4 to 20 on both sides of 0. A quantile is thus exact to 2.5 % of the log-ratio, or to 1e-4.

Clip metrics look at what the objective clips: the log-ratio of the token, of its prefix or of its
response. `policy/kl_*` estimate KL(pi_old || pi_theta) with l = log pi_theta - log pi_old: k1 =
-mean(l) is noisy and of any sign, k3 = mean(e^l - 1 - l) >= 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_cpgd.algorithm.cpgd import drift_weight
from megatron_cpgd.algorithm.surrogate import MAX_LOG_RATIO, Term, TokenInputs, bounded_exp

MEANS = (
    "policy/clip_frac_high",  # A > 0 and l above the bound: no policy gradient
    "policy/clip_frac_low",  # A < 0 and l below the bound: no policy gradient
    "policy/clip_frac_sign_blind",  # l outside the bounds, whatever A
    "policy/masked_frac",  # A is not 0, but there is no policy gradient
    "policy/unclipped_high_frac",  # A < 0 and l above the bound: where PPO's step explodes
    "policy/ratio_mean",
    "policy/kl_k1",
    "policy/kl_k3",
    "policy/drift",  # min(r - 1, c)
    "policy/drift_capped_frac",  # r - 1 > c
    "policy/entropy",
    "policy/neg_logprob_mean",
)
TOTALS = ("tokens", "policy/loss", "policy_force", "drift_force", *MEANS)
QUANTILES = {"policy/ratio_p01": 0.01, "policy/ratio_p99": 0.99, "policy/ratio_p999": 0.999}
MAXIMA = ("policy/ratio_max", "-policy/ratio_min")


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Totals and maxima over a set of tokens, in an order that is the same on every rank."""

    totals: Tensor
    """[len(TOTALS) + bins of the log-ratio] float64; all-reduce with SUM."""
    maxima: Tensor
    """[len(MAXIMA)] float64, -inf where no token was seen; all-reduce with MAX."""

    def finish(self) -> dict[str, float]:
        """The metrics by name; without any token only the loss, which is 0.

        `policy/drift_grad_share` is the drift's part of sum coefficient * (|policy force| + |alpha
        min(r - 1, c)|), in [0, 1]. `policy/loss` is the plain sum of the loss.
        """
        named, counts = self.totals.cpu().tensor_split([len(TOTALS)])
        totals = dict(zip(TOTALS, named.tolist(), strict=True))
        maxima = dict(zip(MAXIMA, self.maxima.tolist(), strict=True))
        loss = {"policy/loss": totals["policy/loss"]}
        if totals["tokens"] == 0:
            return loss
        force = totals["policy_force"] + totals["drift_force"]
        return loss | {
            **{name: totals[name] / totals["tokens"] for name in MEANS},
            "policy/drift_grad_share": totals["drift_force"] / force if force else 0.0,
            **_ratio_quantiles(counts),
            "policy/ratio_max": maxima["policy/ratio_max"],
            "policy/ratio_min": -maxima["-policy/ratio_min"],
        }


def empty_statistics(device: torch.device | str = "cpu") -> Statistics:
    """The statistics of no token: what a rank without micro-batches contributes."""
    return Statistics(
        totals=torch.zeros(len(TOTALS) + _bins(), dtype=torch.float64, device=device),
        maxima=torch.full((len(MAXIMA),), -torch.inf, dtype=torch.float64, device=device),
    )


def merge_statistics(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of the union of at least one disjoint set of tokens."""
    return Statistics(
        totals=torch.stack([part.totals for part in parts]).sum(dim=0),
        maxima=torch.stack([part.maxima for part in parts]).amax(dim=0),
    )


@torch.no_grad()
def token_statistics(
    inputs: TokenInputs,
    term: Term,
    *,
    coefficients: Tensor,
    mask: Tensor,
    entropy: Tensor,
    loss: Tensor,
    drift_coef: float,
    drift_clip: float,
) -> Statistics:
    """Statistics of one micro-batch.

    Args:
        inputs: what the objective read.
        term: its policy term.
        coefficients: [...] float32, of every token, masks and weights included.
        mask: [...] bool, True on response tokens.
        entropy: [...] float32, entropy of pi_theta at each position, in nats.
        loss: scalar, the loss of these tokens.
    """
    tokens = mask.nonzero(as_tuple=True)  # once: on a GPU each indexing with a bool mask waits
    if not len(tokens[0]):
        return empty_statistics(mask.device)
    # In the loss's own precision, so that a token counts as clipped where the loss clips it.
    outside = _outside(term.log_ratio, inputs.log_clip_low, inputs.log_clip_high)
    above, below = (x[tokens] for x in outside)
    log_ratio = inputs.log_ratio[tokens].double()
    advantage, coefficient = inputs.advantages[tokens].double(), coefficients[tokens].double()
    policy_force = coefficient * term.force[tokens].double().abs()
    drift = drift_weight(log_ratio, drift_clip)
    ratio = bounded_exp(log_ratio)
    per_token = {
        "tokens": torch.ones_like(ratio),
        "policy_force": policy_force,
        "drift_force": coefficient * (drift_coef * drift).abs(),
        "policy/clip_frac_high": above & (advantage > 0),
        "policy/clip_frac_low": below & (advantage < 0),
        "policy/clip_frac_sign_blind": above | below,
        "policy/masked_frac": (advantage != 0) & (policy_force == 0),
        "policy/unclipped_high_frac": above & (advantage < 0),
        "policy/ratio_mean": ratio,
        "policy/kl_k1": -log_ratio,
        "policy/kl_k3": _k3(log_ratio),
        "policy/drift": drift,
        "policy/drift_capped_frac": ratio - 1 > drift_clip,
        "policy/entropy": entropy[tokens],
        "policy/neg_logprob_mean": -inputs.logprobs[tokens],
    }
    totals = {name: x.double().sum() for name, x in per_token.items()} | {
        "policy/loss": loss.double()
    }
    return Statistics(
        totals=torch.cat(
            [torch.stack([totals[name] for name in TOTALS]), _count_log_ratios(log_ratio)]
        ),
        maxima=torch.stack([ratio.amax(), (-ratio).amax()]),
    )


def _outside(log_ratio: Tensor, low: Tensor | None, high: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens lie above and which below the clip range: bool, shaped like `log_ratio`."""
    nowhere = torch.zeros_like(log_ratio, dtype=torch.bool)
    above = nowhere if high is None else log_ratio > high
    below = nowhere if low is None else log_ratio < low
    return above, below


@cache
def _bin_edges(device: torch.device) -> Tensor:
    """[E] float64, ascending and symmetric; the E + 1 bins reach to infinity on both sides."""
    side = 1e-4 * 1.05 ** torch.arange(251, dtype=torch.float64)
    return torch.cat([-side.flip(0), side]).to(device)


def _bins() -> int:
    return len(_bin_edges(torch.device("cpu"))) + 1


def _count_log_ratios(log_ratio: Tensor) -> Tensor:
    """[bins] float64, how many of the log-ratios lie in each bin."""
    bins = torch.bucketize(log_ratio, _bin_edges(log_ratio.device))
    return torch.bincount(bins, minlength=_bins()).double()


def _ratio_quantiles(counts: Tensor) -> dict[str, float]:
    """The smallest ratio that a share q of the tokens does not exceed, for every quantile q."""
    edges = _bin_edges(counts.device)
    centers = (edges[1:] * edges[:-1]).abs().sqrt() * edges[1:].sign()  # geometric
    centers[len(edges) // 2 - 1] = 0.0  # the bin around 0
    centers = torch.cat([edges[:1], centers, edges[-1:]])
    reached = counts.cumsum(0)
    return {
        name: centers[torch.searchsorted(reached, q * reached[-1])].exp().item()
        for name, q in QUANTILES.items()
    }


def _k3(log_ratio: Tensor) -> Tensor:
    """e^l - 1 - l: per token >= 0, in expectation the KL divergence."""
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio
