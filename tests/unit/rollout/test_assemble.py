"""From which of several ranks a worker takes what all of them hold."""

import pytest
import torch

from megatron_cpgd.rollout import assemble
from megatron_cpgd.rollout.assemble import TrainerMemory
from megatron_cpgd.weights.pieces import Copy, InPlaceTensor, Piece, PieceList, TrainerRank
from megatron_cpgd.weights.shared_storage import share_storage

BUFFERS = [torch.zeros(2), torch.ones(2)]
"""Of two ranks. Replicas are equal; here each element says which rank it comes from."""


@pytest.fixture
def pieces(tmp_path):
    copies = tuple(Copy(rank, 0, 0, (1,)) for rank in range(2))
    tensor = InPlaceTensor(
        name="x", dtype="F32", shape=(2,), stored_dtype="F32",
        pieces=(Piece(((0, 2, 1),), copies),),
    )  # fmt: skip
    ranks = {
        rank: TrainerRank(gpu=f"GPU-{rank}", storages=(share_storage(buffer.untyped_storage()),))
        for rank, buffer in enumerate(BUFFERS)
    }
    path = tmp_path / "pieces"
    path.write_bytes(PieceList(tensors=(tensor,), ranks=ranks, quantized=False).encode())
    return path


@pytest.mark.parametrize(
    "gpu, sources", [("GPU-0", {0.0}), ("GPU-1", {1.0}), ("GPU-2", {0.0, 1.0}), (None, {0.0, 1.0})]
)
def test_a_worker_reads_the_rank_on_its_own_gpu_or_all_in_turn(pieces, gpu, sources, monkeypatch):
    monkeypatch.setattr(assemble, "gpu_uuid", lambda: gpu)
    memory = TrainerMemory(pieces, torch.device("cpu"))
    tensor = memory.pieces.tensors[0]
    views = [memory.view(tensor, tensor.pieces[0]) for _ in range(4)]
    assert {float(view[0]) for view in views} == sources
