"""A piece list that does not make up the model is refused before anything is read."""

import pytest
import torch

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.weights.pieces import (
    Copy,
    InPlaceTensor,
    Piece,
    PieceList,
    TrainerRank,
    is_piece_list,
    ranges_of,
)
from megatron_cpgd.weights.shared_storage import SharedStorage
from megatron_cpgd.weights.tensor_file import TensorFile


def piece(rows, *, offset=0, stride=(3, 1), rank=0, storage=0):
    """Rows of a matrix with 3 columns."""
    ranges = ranges_of((slice(*rows), slice(0, 3)))
    return Piece(ranges, (Copy(rank, storage, offset, stride),))


def piece_list(*pieces):
    """Of one matrix [4, 3] in bfloat16 and one rank with a storage of 24 bytes, just enough."""
    tensor = InPlaceTensor(
        name="x.weight", dtype="BF16", shape=(4, 3), stored_dtype="BF16", pieces=pieces
    )
    trainer = TrainerRank(gpu=None, storages=(SharedStorage(pid=1, nbytes=24),))
    return PieceList(tensors=(tensor,), ranks={0: trainer}, quantized=False)


WHOLE = piece_list(piece((0, 1)), piece((1, 4), offset=3))


def test_a_list_comes_back_as_it_was(tmp_path):
    assert PieceList.decode(WHOLE.encode()) == WHOLE
    assert WHOLE.full_tensors == {"x.weight": (torch.bfloat16, (4, 3))}
    first, second = WHOLE.tensors[0].pieces
    assert (first.shape, second.shape) == ((1, 3), (3, 3))
    assert second.place == (slice(1, 4, 1), slice(0, 3, 1))
    (tmp_path / "pieces").write_bytes(WHOLE.encode())
    assert is_piece_list(tmp_path / "pieces")


def test_an_arena_is_no_piece_list(tmp_path):
    with TensorFile.create(tmp_path / "arena", {"x": (torch.float32, (2,))}, {}) as arena:
        assert not is_piece_list(arena.path)


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (piece((0, 1)),),
        (piece((0, 2)), piece((1, 4), offset=3)),
        (piece((0, 4)), piece((0, 4))),
    ],
    ids=["none", "a_gap", "an_overlap", "twice"],
)
def test_pieces_that_do_not_make_up_a_tensor_are_refused(pieces):
    with pytest.raises(WeightSyncError, match=r"x\.weight: \d pieces with \d+ of 12 elements do"):
        PieceList.decode(piece_list(*pieces).encode())


@pytest.mark.parametrize(
    "wrong",
    [
        piece((0, 4), offset=1),
        piece((0, 4), stride=(4, 1)),
        piece((0, 4), stride=(-3, 1)),
        piece((0, 4), stride=(1,)),
        piece((0, 4), offset=-1),
        piece((0, 4), storage=1),
        piece((0, 4), rank=1),
    ],
)
def test_a_piece_outside_its_storage_is_refused(wrong):
    with pytest.raises(WeightSyncError, match=r"x\.weight: .*Copy.* lies outside its storage"):
        piece_list(wrong).check()


@pytest.mark.parametrize("keep", [0, 1, -1])
def test_a_damaged_list_is_refused(keep):
    with pytest.raises(WeightSyncError, match="damaged piece list"):
        PieceList.decode(WHOLE.encode()[:keep])
