"""What the loss of a token is divided by, fixed on the whole optimizer step before any split.

The loss is a plain sum over tokens with these coefficients, so no way of spreading tokens over
ranks and micro-batches can change the gradient. With T_k the loss-bearing tokens of a response:

    group_token_mean          1 / (prompts * tokens of the group)     CPGD, Eq. 2
    token_mean                1 / tokens                              DAPO
    sequence_mean_token_mean  1 / (responses * T_k)                   GRPO
    sequence_mean_token_sum   1 / responses                           REINFORCE, MiniRL
    sequence_sum_over_length  1 / (responses * a constant length)     Dr. GRPO

Responses without a token are not counted as responses; a group without a token still counts as a
prompt. Masks (of a correction, of truncated responses) change no denominator: a masked token makes
the step smaller, it does not make the other tokens heavier.
"""

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal[
    "group_token_mean",
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_sum_over_length",
]


def response_coefficients(
    lengths: Tensor, groups: Tensor, kind: Aggregation, *, constant_length: int = 1
) -> Tensor:
    """The coefficient of every token of a response, [N] float32; 0 for an empty response.

    Args:
        lengths: [N] int64, T_k of all responses of ONE optimizer step.
        groups: [N] int64, the prompt of each response; any distinct numbers.
        constant_length: the constant of `sequence_sum_over_length`.
    """
    tokens = lengths.double()
    responses = (lengths > 0).sum().double()
    _, row = groups.unique(return_inverse=True)
    match kind:
        case "group_token_mean":
            group_tokens = torch.zeros_like(tokens).index_add(0, row, tokens)
            denominator = (int(row.max()) + 1) * group_tokens[row]
        case "token_mean":
            denominator = tokens.sum().expand_as(tokens)
        case "sequence_mean_token_mean":
            denominator = responses * tokens
        case "sequence_mean_token_sum":
            denominator = responses.expand_as(tokens)
        case "sequence_sum_over_length":
            denominator = (responses * constant_length).expand_as(tokens)
    return (1.0 / denominator.clamp(min=1.0)).masked_fill(lengths == 0, 0.0).float()
