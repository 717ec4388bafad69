"""Opening and checking a checkpoint folder: lazy slices, and one clear message for every damage."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.hf_checkpoint import INDEX_FILE, SINGLE_FILE, HfCheckpoint
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.table import Ignored

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 6,
    "vocab_size": 11,
}
TABLE = weight_table(CONFIG)


def model_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in TABLE.hf_shapes.items()
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], config: Any = CONFIG) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / SINGLE_FILE)
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = list(tensors)
    weight_map = {}
    for file, part in (("first.safetensors", names[:5]), ("second.safetensors", names[5:])):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("sharded", [False, True])
def test_slices_come_back_as_written(tmp_path: Path, sharded: bool) -> None:
    tensors = model_tensors()
    write_shards(tmp_path, tensors) if sharded else write(tmp_path, tensors)
    with HfCheckpoint.open(tmp_path) as checkpoint:
        checkpoint.check(TABLE)
        assert checkpoint.config == CONFIG
        assert sorted(checkpoint.names) == sorted(tensors)
        name = "model.layers.0.mlp.down_proj.weight"
        index = (slice(2, 5), slice(3, 6))
        part = checkpoint.read(name, index)
        assert torch.equal(part, tensors[name][index])
        part.zero_()  # a copy: the file is untouched
        assert torch.equal(checkpoint.read(name, index), tensors[name][index])
        assert checkpoint.shape(name) == (8, 6) and checkpoint.dtype(name) == torch.bfloat16


def test_check_lists_all_problems_at_once(tmp_path: Path) -> None:
    tensors = model_tensors()
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(12, 8)
    tensors["model.embed_tokens.weight"] = torch.zeros(11, 8, dtype=torch.int8)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(6, 8)
    with (
        HfCheckpoint.open(write(tmp_path, tensors)) as checkpoint,
        pytest.raises(ConversionError) as caught,
    ):
        checkpoint.check(TABLE)
    message = str(caught.value)
    assert f"{tmp_path} does not fit its config.json: 4 problem(s)" in message
    assert "model.norm.weight [8] is missing" in message
    assert "lm_head.weight: expected [11, 8], file has [12, 8]" in message
    assert "model.embed_tokens.weight: torch.int8 is not a supported number format" in message
    assert "model.layers.1.mlp.up_proj.weight [6, 8] is not part of the model" in message


def test_tensors_that_may_be_left_out_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tied = CONFIG | {"tie_word_embeddings": True}
    tensors = model_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    caplog.set_level(logging.INFO)
    with HfCheckpoint.open(write(tmp_path, tensors, tied)) as checkpoint:
        checkpoint.check(weight_table(tied))
    assert "lm_head.weight is left out: tied" in caplog.text
    assert "rotary_emb.inv_freq is left out: is recomputed" in caplog.text


def test_what_is_carried_over_is_reported_and_so_is_its_absence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ignored = Ignored("further.*", "why", carried=True)
    table = dataclasses.replace(TABLE, ignored=(ignored,))
    caplog.set_level(logging.INFO)
    for extra, expected in (
        ({"further.1": torch.ones(2), "further.2": torch.ones(2)}, "INFO"),
        ({}, "WARNING"),
    ):
        caplog.clear()
        (tmp_path / expected).mkdir()
        with HfCheckpoint.open(write(tmp_path / expected, model_tensors() | extra)) as checkpoint:
            checkpoint.check(table)
        [record] = caplog.records
        assert record.levelname == expected
        said = "further.1 and 1 more are carried over: why" if extra else "neither will what is"
        assert said in record.message


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 5}  # 4 layers of 12 tensors are not in the file
    with (
        HfCheckpoint.open(write(tmp_path, model_tensors(), config)) as checkpoint,
        pytest.raises(ConversionError, match=r"48 problem\(s\)(.|\n)*and 28 more$"),
    ):
        checkpoint.check(weight_table(config))


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, model_tensors())
    content = (tmp_path / "second.safetensors").read_bytes()
    (tmp_path / "second.safetensors").write_bytes(content[:-10])
    with pytest.raises(ConversionError, match=r"second\.safetensors: expected \d+ bytes"):
        HfCheckpoint.open(tmp_path)


def test_missing_shards_are_named_together(tmp_path: Path) -> None:
    write_shards(tmp_path, model_tensors())
    for shard in ("first", "second"):
        (tmp_path / f"{shard}.safetensors").unlink()
    with pytest.raises(
        ConversionError, match=r"first\.\w+ is missing(.|\n)*second\.\w+ is missing"
    ):
        HfCheckpoint.open(tmp_path)


def test_an_index_that_does_not_match_its_shards_is_refused(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, model_tensors())
    weight_map |= {"model.norm.weight": "first.safetensors", "x": "second.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConversionError, match="2 problem") as caught:
        HfCheckpoint.open(tmp_path)
    assert "x: listed in model.safetensors.index.json, but not in second" in str(caught.value)


@pytest.mark.parametrize("weight_map", [None, [], {"x": "../x.safetensors"}, {"x": 3}])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConversionError, match="weight_map does not map to file names"):
        HfCheckpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"config\.json: cannot read the file: No such file"),
        ({"config.json": "{"}, r"config\.json: not valid JSON"),
        ({"config.json": "\xff"}, r"config\.json: not valid JSON"),
        ({"config.json": "[]"}, r"config\.json: expected a JSON object, found a list"),
        ({"config.json": "{}"}, r"neither model\.safetensors nor model\.safetensors\.index"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, r"has only pytorch_model\.bin, a pickle"),
        ({"config.json": "{}", SINGLE_FILE: "??"}, r"model\.safetensors: not a safetensors file"),
        ({"config.json": "{}", INDEX_FILE: ""}, r"index\.json: not valid JSON"),
    ],
)
def test_an_unusable_folder_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ConversionError, match=message):
        HfCheckpoint.open(tmp_path)
