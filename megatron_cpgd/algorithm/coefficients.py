"""Mini-batches, clip ranges and epoch weights: what is fixed before a batch is split."""

import torch
from torch import Tensor


def split_mini_batches(num_groups: int, mini_batches: int) -> list[range]:
    """Contiguous ranges of group indices, one per optimizer step; sizes differ by at most one.

    There are `mini_batches` of them, or one per group where fewer groups are left.
    """
    count = min(mini_batches, num_groups)
    return [range(i * num_groups // count, (i + 1) * num_groups // count) for i in range(count)]


def log_clip_bounds(
    response_length: int, *, low: float, high: float, start: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Clip range of the log-ratio: ln(1 - low_i) and ln(1 + high_i), [T] float32 each.

    Tight-to-loose (arXiv:2505.12504, Clarification I): eps_i = start * eps + (1 - start) * eps *
    i / T for i = 1..T, so the last token has eps itself; start = 1 is a constant range.

    Args:
        response_length: T, of the whole response, not of a context-parallel slice.
        low: lower epsilon, in (0, 1).
        high: upper epsilon, > 0.
        start: lambda of the paper, in [0, 1].
    """
    position = torch.arange(1, response_length + 1, dtype=torch.float64)
    scale = start + (1.0 - start) * position / response_length
    return torch.log1p(-low * scale).float(), torch.log1p(high * scale).float()


def truncated_epoch_weight(
    epoch_start_logprobs: Tensor, old_logprobs: Tensor, *, low: float, high: float
) -> Tensor:
    """Weight of the advantages in epochs after the first (arXiv:2505.12504, section 6.1).

    clip(pi_epoch / pi_old, 1 - low, 1 + high), without gradient. pi_epoch is the policy at the
    START of the epoch, not the live one; in the first epoch it is pi_old and the weight is 1.

    Args:
        epoch_start_logprobs: [T] log-probabilities of the sampled tokens under pi_epoch.
        old_logprobs: [T] the same under pi_old.
        low: epsilon of the lower side.
        high: epsilon of the upper side.
    """
    ratio = torch.exp(epoch_start_logprobs.detach() - old_logprobs.detach())
    return ratio.clamp(min=1.0 - low, max=1.0 + high)
