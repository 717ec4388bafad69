"""The mapped safetensors file: format, sharing between processes, damage."""

import json
import multiprocessing
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.tensor_file import TensorFile

TENSORS = {
    "z.weight": (torch.bfloat16, (3, 5)),
    "a.weight": (torch.float32, (7,)),
    "empty": (torch.float32, (0, 4)),
    "scalar": (torch.int64, ()),
}


def fill(file: TensorFile) -> dict[str, torch.Tensor]:
    values = {}
    for number, name in enumerate(file.names):
        view = file.view(name)
        values[name] = torch.arange(view.numel()).view(view.shape).to(view.dtype) + number
        view.copy_(values[name])
    return values


def test_safetensors_reads_back_what_was_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with TensorFile.create(path, TENSORS, {"format": "pt"}) as file:
        values = fill(file)
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    for name, value in values.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)
        assert loaded[name].dtype == TENSORS[name][0]
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_names_keep_their_order_and_views_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    TensorFile.create(path, TENSORS, {}).close()
    file = TensorFile.open(path)
    assert file.names == ["z.weight", "a.weight", "empty", "scalar"]
    # 15 bf16 + 7 fp32 + 0 + 1 int64 = 30 + 28 + 8 bytes
    assert file.nbytes == 66
    for name in file.names:
        assert file.view(name).data_ptr() % file.view(name).dtype.itemsize == 0
        assert torch.count_nonzero(file.view(name)) == 0


def test_a_file_of_the_safetensors_library_opens(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(4, 3).bfloat16(), "a": torch.randn(2), "f8": torch.ones(3).byte()}
    save_file(tensors, tmp_path / "x.safetensors")
    with TensorFile.open(tmp_path / "x.safetensors") as file:
        assert set(file.names) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.view(name), tensor)


def test_a_view_outlives_close(tmp_path: Path) -> None:
    file = TensorFile.create(tmp_path / "x.safetensors", TENSORS, {})
    view = file.view("a.weight")
    view.fill_(2.0)
    file.close()
    assert view.sum() == 14.0


def write_columns(path: Path, rank: int) -> None:
    with TensorFile.open(path, writable=True) as file:
        file.view("w")[:, rank * 2 : rank * 2 + 2] = rank + 1.0


def test_forked_processes_write_disjoint_boxes_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    file = TensorFile.create(path, {"w": (torch.float32, (3, 4))}, {})
    reader = TensorFile.open(path)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_columns, args=(path, rank)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    expected = torch.tensor([[1.0, 1.0, 2.0, 2.0]] * 3)
    assert torch.equal(file.view("w"), expected)
    assert torch.equal(reader.view("w"), expected)
    assert torch.equal(load_file(path)["w"], expected)


def test_digest_sees_every_change_and_every_exchange(tmp_path: Path) -> None:
    tensors = {name: (torch.float32, (4,)) for name in ("a", "b")}
    file = TensorFile.create(tmp_path / "x.safetensors", tensors, {"step": "1"})
    zeros = file.digest()
    file.view("a").copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    first = file.digest()
    file.view("a").copy_(torch.tensor([2.0, 1.0, 3.0, 4.0]))
    exchanged = file.digest()
    file.view("a").zero_()
    file.view("b").copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    other_name = file.digest()
    assert len({zeros, first, exchanged, other_name}) == 4
    assert TensorFile.open(file.path).digest() == other_name
    # The digest belongs to the tensors: other metadata and another layout leave it alone.
    again = TensorFile.create(tmp_path / "y.safetensors", tensors, {})
    again.view("b").copy_(file.view("b"))
    assert again.digest() == other_name


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(ConversionError, match=r"x\.safetensors: cannot create.*exists"):
        TensorFile.create(path, TENSORS, {})
    assert path.read_bytes() == b"precious"


def test_a_full_disk_fails_before_anything_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    huge = {"w": (torch.float32, (1 << 44,))}  # 64 TiB
    with pytest.raises(ConversionError, match=r"x\.safetensors: (needs|cannot allocate) 70368\.74"):
        TensorFile.create(path, huge, {})
    assert not path.exists()


def header_file(path: Path, header: object, payload: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path


def slot(start: int, end: int, shape: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": slot(0, 8, [3])}, "damaged.*w"),  # 3 floats are 12 bytes
        ({"w": slot(4, 8, [1])}, "damaged.*expected to start at 0"),  # a hole
        ({"w": slot(0, 8, [2]), "v": slot(0, 8, [2])}, "damaged"),  # an overlap
        ({"w": slot(0, 4, [1])}, "expected 4 bytes of tensors, the file has 8"),
        ({"w": slot(0, 12, [3])}, "expected 12 bytes of tensors, the file has 8"),
        ({"w": slot(-8, 0, [-2])}, "damaged"),
        ({"w": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, "damaged.*F31"),
        ({"w": {"dtype": "F32"}}, "damaged"),
        ({"w": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]}}, "damaged"),
        ({"w": None}, "damaged"),
        ([], "damaged"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    tmp_path: Path, header: object, message: str
) -> None:
    path = header_file(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(ConversionError, match=r"bad\.safetensors.*" + message):
        TensorFile.open(path)


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 64, struct.pack("<Q", 50) + b"{}"])
def test_a_file_without_a_whole_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"bad\.safetensors: not a safetensors file"):
        TensorFile.open(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with TensorFile.create(path, TENSORS, {}) as file:
        fill(file)
    whole = path.stat().st_size
    for size in (whole - 1, whole - 66, whole // 2, 8, 7, 0):
        os.truncate(path, size)
        with pytest.raises(ConversionError, match=r"x\.safetensors"):
            TensorFile.open(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"none\.safetensors: cannot open.*No such file"):
        TensorFile.open(tmp_path / "none.safetensors")
