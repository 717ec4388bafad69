"""The CPU layers against the textbook formulas in double precision."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_cpgd.policy.cpu_layers import RMSNorm
from tests.helpers.layer_jobs import attention_job
from tests.helpers.ranks import run_distributed

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[L, heads * d] of one sequence; query head h reads KV head h // (heads / KV heads)."""
    length, heads, width = query.shape
    columns = []
    for head in range(heads):
        kv = head // (heads // key.size(1))
        scores = query[:, head] @ key[:, kv].T / math.sqrt(width)
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        hidden = (distance < 0) | (distance > (length if window is None else window))
        weights = scores.masked_fill(hidden, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks[head].exp()
        columns.append(weights / total @ value[:, kv])
    return torch.cat(columns, dim=1)


def random_inputs(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    heads = [(HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (HEADS * HEAD_DIM,)]
    return [torch.randn(*shape, *last, generator=generator) for last in heads]


def compare(expected: Tensor, inputs: list[Tensor], weight: Tensor, results: list[dict]) -> None:
    """Output and gradients of all ranks, each at its positions, against the whole."""
    (expected * weight).sum().backward()
    for result in results:
        where = result["positions"]
        whole = {"output": expected.detach()}
        whole |= {name: x.grad for name, x in zip("qkv", inputs, strict=True)}
        for name, value in whole.items():
            torch.testing.assert_close(result[name].double(), value[where], atol=2e-6, rtol=1e-5)
    covered = torch.cat([result["positions"] for result in results])
    assert covered.sort().values.tolist() == list(range(len(expected)))


# Lengths of 1 and equal ones; at cp = 2 every sequence is a multiple of 4. The last case is what a
# rank without sequences computes.
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "lengths"),
    [(1, [1, 7, 1, 16, 7]), (1, [1]), (2, [4, 12, 4, 20]), (2, [4])],
)
def test_packed_attention_is_that_of_each_sequence_alone(ranks, lengths):
    boundaries = [0, *itertools.accumulate(lengths)]
    *inputs, weight = random_inputs(boundaries[-1])
    results = run_distributed(ranks, attention_job, *inputs, weight, boundaries)
    whole = [x.double().requires_grad_() for x in inputs]
    expected = torch.cat(
        [causal_attention(*(x[a:b] for x in whole)) for a, b in itertools.pairwise(boundaries)]
    )
    compare(expected, whole, weight, results)


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "length"), [(1, 1), (1, 9), (2, 12)])
def test_padded_attention_is_that_of_each_row(ranks, length):
    *inputs, weight = random_inputs(length, 3)
    results = run_distributed(ranks, attention_job, *inputs, weight, None)
    whole = [x.double().requires_grad_() for x in inputs]
    rows = [causal_attention(*(x[:, row] for x in whole)) for row in range(3)]
    compare(torch.stack(rows, dim=1), whole, weight, results)


SINKS = torch.tensor([-1.0, 0.0, 2.5, 4.0, -30.0, 0.5])


# At cp = 2 rank 0 holds the first and the last quarter of a sequence: its window ends in rank 1.
@pytest.mark.distributed
@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("window", [None, 0, 3])
@pytest.mark.parametrize(("ranks", "lengths"), [(1, [1, 7, 16]), (2, [4, 12, 20]), (2, None)])
def test_windows_count_positions_of_the_whole_sequence_and_sinks_take_their_share(
    ranks, lengths, window, sinks
):
    if lengths is None:  # padded
        *inputs, weight = random_inputs(12, 2)
        boundaries, parts = None, [(slice(None), row) for row in range(2)]
    else:
        boundaries = [0, *itertools.accumulate(lengths)]
        *inputs, weight = random_inputs(boundaries[-1])
        parts = [slice(a, b) for a, b in itertools.pairwise(boundaries)]
    results = run_distributed(ranks, attention_job, *inputs, weight, boundaries, window, sinks)
    whole = [x.double().requires_grad_() for x in inputs]
    wide = None if sinks is None else sinks.double().requires_grad_()
    rows = [causal_attention(*(x[part] for x in whole), window, wide) for part in parts]
    compare(torch.cat(rows) if lengths else torch.stack(rows, dim=1), whole, weight, results)
    if wide is not None:
        found = sum(result["sinks"].double() for result in results)
        torch.testing.assert_close(found, wide.grad, atol=2e-5, rtol=1e-5)


def norm(dtype: torch.dtype = torch.float32, sequence_parallel: bool = False) -> RMSNorm:
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)
    layer = RMSNorm(config, 16, eps=1e-3)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 2, 16))
    return layer


def test_rms_norm_divides_by_the_root_of_the_mean_square():
    layer, x = norm(), torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))
    wide = x.double()
    expected = layer.weight * wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-6, rtol=1e-6)


def test_rms_norm_of_bf16_is_computed_in_fp32_and_rounded_before_the_weight():
    layer = norm(torch.bfloat16)
    x = 300 * torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.double()
    normed = (wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()).bfloat16()
    assert layer(x).dtype is torch.bfloat16
    torch.testing.assert_close(layer(x), layer.weight * normed, atol=0, rtol=0)


def test_only_under_sequence_parallel_does_megatron_sum_the_norms_gradient_over_tp():
    assert norm(sequence_parallel=True).weight.sequence_parallel is True
    assert norm(sequence_parallel=False).weight.sequence_parallel is False
