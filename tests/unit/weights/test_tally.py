"""What is written of full tensors is counted, and its bits are summed up."""

import pytest
import torch

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.fingerprint import whole_fingerprint
from megatron_cpgd.weights.tally import Tally, check_written

TENSORS = {"w": (torch.bfloat16, (2, 3)), "v": (torch.float32, (3,))}


def test_an_incomplete_export_names_the_tensor():
    check_written(TENSORS, {"w": 6, "v": 3})
    with pytest.raises(ConversionError, match="w: 4 of 6 elements written") as caught:
        check_written(TENSORS, {"w": 4, "v": 3, "x": 1})
    assert "x: 1 of 0" in str(caught.value) and "v:" not in str(caught.value)


def test_the_counts_of_two_ranks_prove_whole_tensors_and_their_rounded_bits():
    weights = {"w": torch.randn(2, 3), "v": torch.randn(3)}
    ranks = [Tally(TENSORS, torch.device("cpu")) for _ in range(2)]
    parts = [
        [("w", (slice(0, 1), slice(0, 3)), weights["w"][:1])],
        [("w", (slice(1, 2), slice(0, 3)), weights["w"][1:]), ("v", (slice(0, 3),), weights["v"])],
    ]
    for tally, pieces in zip(ranks, parts, strict=True):
        for name, _, values in tally.summed(pieces):
            tally.wrote(name, values)
    with pytest.raises(ConversionError, match="w: 3 of 6"):
        ranks[0].check()
    ranks[0].counts += ranks[1].counts
    ranks[0].check()
    rounded = {name: weight.to(TENSORS[name][0]) for name, weight in weights.items()}
    assert ranks[0].fingerprints == {name: whole_fingerprint(w) for name, w in rounded.items()}
