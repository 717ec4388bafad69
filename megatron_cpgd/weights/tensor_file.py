"""A safetensors file that is mapped into memory and filled in place, by several processes at once.

In shared memory it is the arena of the live weight sync, on disk it is a shard of an exported
checkpoint; either way `safetensors.torch.load_file` reads it.
Format: https://github.com/huggingface/safetensors#format.
"""

import errno
import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.fingerprint import Fingerprints, combine, whole_fingerprint

ALIGNMENT = 64
"""Bytes; the payload starts at a multiple of it, so that a view of any dtype is aligned."""
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where one tensor lies: bytes [start, end) of the payload."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """The tensors of one safetensors file as views of a shared mapping."""

    def __init__(
        self,
        path: Path,
        mapping: mmap.mmap,
        payload_start: int,
        slots: dict[str, TensorSlot],
        metadata: dict[str, str],
    ) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.slots = slots
        """By tensor name, in the order of the header."""
        self.metadata = metadata
        """The free strings of the header."""
        self._mapping: mmap.mmap | None = mapping
        self._payload: Tensor | None = _byte_view(mapping, payload_start)

    @classmethod
    def create(
        cls,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
        *,
        mode: int = 0o666,
    ) -> Self:
        """A new zero-filled file, with all its space allocated, open for writing.

        Args:
            path: must not exist; a file that another process maps is never cut under its feet.
            tensors: dtype and shape by name; `names` keeps this order.
            metadata: strings stored in the header.
            mode: permissions, less those of the umask.

        Raises:
            ConversionError: the file exists, or its file system has no room.
        """
        header, payload_bytes = _encode_header(tensors, metadata)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise ConversionError(f"{path}: cannot create the file: {error.strerror}") from error
        try:
            os.posix_fallocate(descriptor, 0, len(header) + payload_bytes)
            os.pwrite(descriptor, header, 0)
        except OSError as error:
            path.unlink()
            raise ConversionError(_allocation_message(path, payload_bytes, error)) from error
        finally:
            os.close(descriptor)
        return cls.open(path, writable=True)

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Self:
        """Map an existing file; what other processes write to it shows in the views.

        A write to a view of a file that was opened read-only ends the process (SIGSEGV).

        Raises:
            ConversionError: missing, truncated, or not a safetensors file.
        """
        try:
            with path.open("r+b" if writable else "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header_end = _header_end(path, file.read(8), size)
                slots, metadata = _decode_header(path, file.read(header_end - 8), size - header_end)
                access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
                mapping = mmap.mmap(file.fileno(), 0, access=access)
        except OSError as error:
            raise ConversionError(f"{path}: cannot open the file: {error.strerror}") from error
        return cls(path, mapping, header_end, slots, metadata)

    @property
    def names(self) -> list[str]:
        """Tensor names in the order they were given to `create`."""
        return list(self.slots)

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Number format and shape by name, as given to `create`."""
        return {name: (slot.dtype, slot.shape) for name, slot in self.slots.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(slot.end - slot.start for slot in self.slots.values())

    def view(self, name: str) -> Tensor:
        """The tensor itself, not a copy. It stays valid after `close`."""
        assert self._payload is not None, f"{self.path} is closed"
        slot = self.slots[name]
        return self._payload[slot.start : slot.end].view(slot.dtype).view(slot.shape)

    def digest(self) -> str:
        """16 hex digits over names, dtypes, shapes and bytes of all tensors, in order.

        It finds accidents (a stale, missing, swapped or damaged tensor), not attacks.
        """
        return combine(self.tensors, self.fingerprints())

    def fingerprints(self, names: Iterable[str] | None = None) -> Fingerprints:
        """Of these tensors, or of all."""
        chosen = list(self.slots if names is None else names)
        # All cores, whatever OMP_NUM_THREADS is: most processes of a run have 1.
        cores = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(max_workers=max(1, cores // torch.get_num_threads())) as pool:
            sums = pool.map(lambda name: whole_fingerprint(self.view(name)), chosen)
            return dict(zip(chosen, sums, strict=True))

    def flush(self) -> None:
        """Return once everything written so far is on disk."""
        assert self._mapping is not None, f"{self.path} is closed"
        self._mapping.flush()

    def close(self) -> None:
        """Let go of the mapping; its memory is unmapped when the last view is gone."""
        # Not mmap.close(): torch keeps no buffer export, so live views would point nowhere.
        self._payload = None
        self._mapping = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Size of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def _byte_view(mapping: mmap.mmap, start: int) -> Tensor:
    """[payload bytes] uint8 over the mapping, which it keeps alive."""
    if len(mapping) == start:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8, offset=start)


def _encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """Everything before the payload, and the size of the payload in bytes."""
    # The format allows no gap between tensors. Wide dtypes first keeps each of them aligned.
    offsets, end = {}, 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        offsets[name] = (end, end + tensor_bytes(dtype, shape))
        end = offsets[name][1]
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, (dtype, shape) in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": list(offsets[name]),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, end


def _allocation_message(path: Path, needed: int, error: OSError) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{path}: cannot allocate {needed / 1e9:.2f} GB: {error.strerror}"
    state = os.statvfs(path.parent)
    return (
        f"{path}: needs {needed / 1e9:.2f} GB, its file system has "
        f"{state.f_bavail * state.f_frsize / 1e9:.2f} GB left ({error.strerror}); free some space"
    )


def _header_end(path: Path, first_bytes: bytes, file_bytes: int) -> int:
    """Byte at which the payload starts."""
    length = struct.unpack("<Q", first_bytes)[0] if len(first_bytes) == 8 else file_bytes
    if not 2 <= length <= min(file_bytes - 8, MAX_HEADER_BYTES):
        raise ConversionError(
            f"{path}: not a safetensors file, or cut off: {file_bytes} bytes, of which the header "
            f"claims {length}; download it again"
        )
    return 8 + int(length)


def _decode_header(
    path: Path, text: bytes, payload_bytes: int
) -> tuple[dict[str, TensorSlot], dict[str, str]]:
    """Slots by name and the metadata; a header that does not fit the payload is refused."""
    try:
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__", {}))
        slots = {name: _decode_slot(entry) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{path}: damaged safetensors header ({error!r})") from error
    end = 0
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].end)):
        if slot.start != end or slot.end - slot.start != tensor_bytes(slot.dtype, slot.shape):
            raise ConversionError(
                f"{path}: damaged safetensors header: {name} {list(slot.shape)} {slot.dtype} "
                f"at bytes {slot.start}:{slot.end}, expected to start at {end}"
            )
        end = slot.end
    if end != payload_bytes:
        raise ConversionError(
            f"{path}: expected {end} bytes of tensors, the file has {payload_bytes}; "
            "it was cut off or damaged, download it again"
        )
    return slots, metadata


def _decode_slot(entry: dict[str, Any]) -> TensorSlot:
    start, end = (index(offset) for offset in entry["data_offsets"])
    shape = tuple(index(size) for size in entry["shape"])
    if min((start, *shape)) < 0:
        raise ValueError(f"negative size in {entry}")
    return TensorSlot(DTYPES[entry["dtype"]], shape, start, end)
