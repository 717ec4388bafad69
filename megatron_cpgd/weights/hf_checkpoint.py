"""A Hugging Face checkpoint on disk: its configuration, and slices of its tensors."""

import json
import logging
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights import mxfp4
from megatron_cpgd.weights.table import WeightTable, raise_problems
from megatron_cpgd.weights.tensor_file import TensorFile
from megatron_cpgd.weights.tiling import Index

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the two parts of a tensor in MXFP4."""
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class HfCheckpoint:
    """All safetensors files of a folder, mapped; nothing is read before it is asked for.

    Projections of experts in MXFP4, [experts, rows, columns], are seen under the name, in the order
    [experts, columns, rows] and in the bfloat16 of the release that is not quantised.
    """

    def __init__(self, path: Path, config: dict[str, Any], files: list[TensorFile]) -> None:
        """Use `open`."""
        self.path = path
        self.config = config
        """config.json, parsed."""
        self._files = files
        self._file_of = {name: file for file in files for name in file.names}
        stems = [name.removesuffix(BLOCKS) for name in self._file_of if name.endswith(BLOCKS)]
        self._quantized = {stem for stem in stems if stem + SCALES in self._file_of}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map the files of a checkpoint folder.

        Raises:
            ConversionError: a file is missing, cut off or damaged; the message names it.
        """
        config = read_config(path)
        listed = _listed_tensors(path)
        names = sorted(set(listed.values())) if listed is not None else [SINGLE_FILE]
        missing = [name for name in names if not (path / name).is_file()]
        raise_problems(f"{path}", [f"{name} is missing; download it" for name in missing])
        checkpoint = cls(path, config, [TensorFile.open(path / name) for name in names])
        checkpoint._check_index(listed or {})
        checkpoint._check_quantized()
        return checkpoint

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        parts = {stem + ending for stem in self._quantized for ending in (BLOCKS, SCALES)}
        return [name for name in self._file_of if name not in parts] + sorted(self._quantized)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if name in self._quantized:
            experts, rows, groups, _ = self._view(name + BLOCKS).shape
            return experts, groups * mxfp4.GROUP, rows
        return self._file_of[name].slots[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor."""
        if name in self._quantized:
            return torch.bfloat16
        return self._file_of[name].slots[name].dtype

    def read(self, name: str, index: Index) -> Tensor:
        """A copy of one slice; only the pages it touches are read from disk."""
        if name in self._quantized:
            return self._dequantize(name, index)
        return self._view(name)[index].clone()

    def _view(self, name: str) -> Tensor:
        return self._file_of[name].view(name)

    def _dequantize(self, name: str, index: Index) -> Tensor:
        """[columns, rows] of one expert."""
        expert, columns, rows = index
        assert isinstance(columns, slice), f"{name}: {index=}"
        first, stop, _ = columns.indices(self.shape(name)[1])
        skipped = first // mxfp4.GROUP * mxfp4.GROUP
        groups = slice(skipped // mxfp4.GROUP, -(-stop // mxfp4.GROUP))
        blocks, scales = (self._view(name + end)[expert, rows, groups] for end in (BLOCKS, SCALES))
        return mxfp4.dequantize(blocks, scales)[..., first - skipped : stop - skipped].mT

    def equal(self, left: str, right: str) -> bool:
        """Whether two tensors hold the same values in the same number format."""
        if (self.dtype(left), self.shape(left)) != (self.dtype(right), self.shape(right)):
            return False
        return torch.equal(*(self._file_of[name].view(name) for name in (left, right)))

    def check(self, table: WeightTable) -> None:
        """Compare names, shapes and dtypes with the model.

        Raises:
            ConversionError: lists every tensor that is missing, unknown or does not fit.
        """
        problems = []
        present = set(self.names)
        for name, shape in table.hf_shapes.items():
            if name not in present:
                problems.append(f"{name} {list(shape)} is missing")
            elif self.shape(name) != shape:
                problems.append(
                    f"{name}: expected {list(shape)}, file has {list(self.shape(name))}"
                )
            elif self.dtype(name) not in FLOAT_DTYPES:
                problems.append(f"{name}: {self.dtype(name)} is not a supported number format")
        others: dict[tuple[str, bool], list[str]] = {}
        for name in self.names:
            if name in table.hf_shapes:
                continue
            if ignored := table.find_ignored(name):
                others.setdefault((ignored.reason, ignored.carried), []).append(name)
            else:
                problems.append(f"{name} {list(self.shape(name))} is not part of the model")
        if table.carries and not any(carried for _, carried in others):
            logger.warning(
                "%s: config.json has num_nextn_predict_layers=%s, the files have no such layer: "
                "neither will what is exported",
                self.path,
                self.config.get("num_nextn_predict_layers"),
            )
        for (reason, carried), names in others.items():
            which = "is" if len(names) == 1 else f"and {len(names) - 1} more are"
            fate = "carried over" if carried else "left out"
            logger.info("%s: %s %s %s: %s", self.path, names[0], which, fate, reason)
        raise_problems(f"{self.path} does not fit its config.json", problems)

    def close(self) -> None:
        """Unmap the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_index(self, listed: dict[str, str]) -> None:
        problems = [
            f"{name}: listed in {INDEX_FILE}, but not in {shard}"
            for name, shard in listed.items()
            if name not in self._file_of or self._file_of[name].path.name != shard
        ]
        raise_problems(f"{self.path}", problems)

    def _check_quantized(self) -> None:
        problems = []
        for stem in self._quantized:
            blocks, scales = self._view(stem + BLOCKS), self._view(stem + SCALES)
            expected = (*scales.shape, mxfp4.GROUP // 2)
            if blocks.shape != expected or blocks.ndim != 4 or blocks.dtype != torch.uint8:
                problems.append(
                    f"{stem + BLOCKS}: expected uint8 [experts, rows, groups, {mxfp4.GROUP // 2}] "
                    f"as {stem + SCALES} has {list(scales.shape)}, file has {blocks.dtype} "
                    f"{list(blocks.shape)}"
                )
        raise_problems(f"{self.path}", problems)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        ConversionError: missing or not a JSON object.
    """
    return _read_json_object(path / "config.json")


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ConversionError(f"{path}: cannot read the file: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _listed_tensors(path: Path) -> dict[str, str] | None:
    """File name by tensor name from the index, or None for a checkpoint in a single file."""
    if (path / INDEX_FILE).is_file():
        weight_map = _read_json_object(path / INDEX_FILE).get("weight_map")
        # A file name with a folder in it could reach outside the checkpoint.
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in weight_map.values()
        ):
            raise ConversionError(f"{path / INDEX_FILE}: weight_map does not map to file names")
        return weight_map
    if (path / SINGLE_FILE).is_file():
        return None
    pickled = sorted(path.glob("*.bin"))
    if pickled:
        raise ConversionError(
            f"{path}: has only {pickled[0].name}, a pickle that could run code when it is read; "
            f"use a safetensors version of the model"
        )
    raise ConversionError(f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
