"""Write a Hugging Face checkpoint in place by several processes; it appears whole or not at all."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.carried import CarriedTensors, Tensors
from megatron_cpgd.weights.hf_checkpoint import INDEX_FILE, SINGLE_FILE, HfCheckpoint, read_config
from megatron_cpgd.weights.table import WeightTable
from megatron_cpgd.weights.tensor_file import TensorFile, tensor_bytes

logger = logging.getLogger(__name__)

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
"""Configuration, tokenizer, chat template and licence: copied from the source checkpoint."""
CODE_FILES = ("*.py",)
DEFAULT_SHARD_BYTES = 5 * 2**30


class HfWriter:
    """A checkpoint under construction, in a hidden folder beside its final place.

    One process calls `create`, the others `attach` after it; all fill views; the creator calls
    `commit` when all have finished, or `abort`.
    """

    def __init__(
        self, out_dir: Path, files: list[TensorFile], copies: dict[str, str], *, overwrite: bool
    ) -> None:
        """Use `create` or `attach`."""
        self.out_dir = out_dir
        self._files = files
        self._file_of = {name: file for file in files for name in file.names}
        self._copies = copies
        self._overwrite = overwrite

    @classmethod
    def create(
        cls,
        out_dir: Path,
        *,
        table: WeightTable,
        source_dir: Path,
        dtype: torch.dtype,
        carried_file: Path | None = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
        copy_code: bool = False,
    ) -> Self:
        """Lay out all files, zero-filled, in layer order.

        Args:
            source_dir: checkpoint that gives config.json, tokenizer, chat template and the tensors
                that the table carries over.
            dtype: number format of all trained tensors but those that the model keeps in float32.
            carried_file: `CarriedTensors.save` has written it; in place of the weights of
                source_dir.
            overwrite: let `commit` replace out_dir if it holds a checkpoint already.
            copy_code: also copy the source's Python files.

        Raises:
            ConversionError: out_dir exists, source_dir is unusable, or the disk is full.
        """
        _check_out_dir(out_dir, source_dir, overwrite=overwrite)
        config = read_config(source_dir)
        partial = _partial_dir(out_dir)
        if partial.exists():
            logger.warning("removing %s, left by an export that was interrupted", partial)
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            copy_side_files(source_dir, partial, SIDE_FILES + (CODE_FILES if copy_code else ()))
            _write_json(partial / "config.json", _with_dtype(config, dtype))
            with _open_carried(table, source_dir, carried_file) as carried:
                tensors = carried.layout(table.hf_tensors(dtype))
                files = _create_files(partial, tensors, max_shard_bytes)
                writer = cls(out_dir, files, carried.copies, overwrite=overwrite)
                carried.copy_to(writer.view)
                return writer
        except BaseException:
            shutil.rmtree(partial)
            raise

    @classmethod
    def attach(cls, out_dir: Path) -> Self:
        """The checkpoint that another process has created and not committed yet."""
        paths = sorted(_partial_dir(out_dir).glob("*.safetensors"))
        if not paths:
            raise ConversionError(f"{out_dir}: no export is under way in {_partial_dir(out_dir)}")
        files = [TensorFile.open(path, writable=True) for path in paths]
        return cls(out_dir, files, {}, overwrite=False)

    def view(self, hf_name: str) -> Tensor:
        """The full tensor in its file; what is written to it is in the checkpoint."""
        return self._file_of[hf_name].view(hf_name)

    def commit(self) -> None:
        """Put everything on disk, then move the folder to its final place.

        Raises:
            ConversionError: out_dir has come into being since `create`.
        """
        for copy, original in self._copies.items():
            self.view(copy).copy_(self.view(original))
        for file in self._files:
            file.flush()
        self.close()
        partial, replaced = _partial_dir(self.out_dir), _hidden_sibling(self.out_dir, "replaced")
        for path in (*partial.iterdir(), partial):
            _sync_to_disk(path)
        if self._overwrite and self.out_dir.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            self.out_dir.rename(replaced)
        if self.out_dir.exists():
            raise ConversionError(f"{self.out_dir} exists; the export is complete in {partial}")
        partial.rename(self.out_dir)
        _sync_to_disk(self.out_dir.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def abort(self) -> None:
        """Remove everything that was written."""
        self.close()
        shutil.rmtree(_partial_dir(self.out_dir))

    def close(self) -> None:
        """Let go of the files; for attached processes that have finished writing."""
        for file in self._files:
            file.close()


def plan_shards(tensors: Tensors, max_shard_bytes: int) -> list[Tensors]:
    """Cut a checkpoint into files in order; a tensor over the limit gets a file of its own."""
    shards: list[Tensors] = [{}]
    size = 0
    for name, (dtype, shape) in tensors.items():
        added = tensor_bytes(dtype, shape)
        if shards[-1] and size + added > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += added
    return shards


def _check_out_dir(out_dir: Path, source_dir: Path, *, overwrite: bool) -> None:
    """Refuse to replace anything that is not the output of an earlier export."""
    if not out_dir.exists():
        return
    if not overwrite:
        raise ConversionError(f"{out_dir} exists; remove it or choose another folder")
    if out_dir.samefile(source_dir) or not (out_dir / "config.json").is_file():
        raise ConversionError(
            f"{out_dir} is the source or no checkpoint folder, and is not overwritten; "
            "choose another folder"
        )


def _open_carried(
    table: WeightTable, source_dir: Path, carried_file: Path | None
) -> CarriedTensors:
    if not table.carries:
        return CarriedTensors(HfCheckpoint(source_dir, {}, []), [], {})
    if carried_file is not None:
        return CarriedTensors.open(carried_file)
    return CarriedTensors.find(HfCheckpoint.open(source_dir), table)


def _create_files(folder: Path, tensors: Tensors, max_shard_bytes: int) -> list[TensorFile]:
    """The safetensors files and, if they are several, their index."""
    shards = plan_shards(tensors, max_shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        weight_map = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(tensor_bytes(dtype, shape) for dtype, shape in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)
    # transformers refuses files without this mark.
    metadata = {"format": "pt"}
    return [
        TensorFile.create(folder / name, shard, metadata)
        for name, shard in zip(names, shards, strict=True)
    ]


def copy_side_files(source: Path, target: Path, patterns: tuple[str, ...] = SIDE_FILES) -> None:
    """Copy config.json, tokenizer and templates: all top-level files of a model but its weights."""
    paths = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    for path in sorted(paths):
        if not path.name.endswith(".index.json"):  # weights have indexes of their own
            shutil.copyfile(path, target / path.name)


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    # transformers 4 reads `torch_dtype`; a file that had it keeps it.
    old_key = {"torch_dtype": name} if "torch_dtype" in config else {}
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return {**plain, **old_key, "dtype": name}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial_dir(out_dir: Path) -> Path:
    return _hidden_sibling(out_dir, "partial")


def _hidden_sibling(out_dir: Path, suffix: str) -> Path:
    return out_dir.parent / f".{out_dir.name}.{suffix}"
