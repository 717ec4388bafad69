"""The written checkpoint: whole or absent, readable by transformers, filled by many processes."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.carried import CarriedTensors
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.hf_export import HfWriter, plan_shards
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.table import Ignored, WeightTable, export_pieces, import_tensor

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 101,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A random model as transformers saves it, with the files that surround a real one."""
    torch.manual_seed(0)
    folder = tmp_path / "source"
    AutoModelForCausalLM.from_config(Qwen2Config(**SIZES)).save_pretrained(folder)
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "modeling.py", "LICENSE"):
        (folder / name).write_text(f"content of {name}")
    return folder


def export_shards(source: Path, writer: HfWriter, table: WeightTable, ranks: list[int]) -> None:
    """What tensor-parallel ranks of a Megatron job do, at tp = 2 with a padded vocabulary."""
    with HfCheckpoint.open(source) as checkpoint:
        for rank in ranks:
            for entry in table.entries:
                shape = [104 if entry.padded else entry.shape[0], *entry.shape[1:]]
                if entry.split != "replicated":
                    shape[0 if entry.split == "rows" else 1] //= 2
                local = torch.empty(shape)
                import_tensor(entry, local, checkpoint.read, tp_rank=rank, tp_size=2)
                for name, place, values in export_pieces(entry, local, tp_rank=rank, tp_size=2):
                    writer.view(name)[place].copy_(values)


def export_as_attached_rank(source: Path, out: Path, table: WeightTable) -> None:
    writer = HfWriter.attach(out)
    export_shards(source, writer, table, [1])
    writer.close()


@pytest.mark.parametrize("max_shard_bytes", [10_000, 10**9])
def test_transformers_loads_the_export_of_two_processes_with_equal_logits(
    source: Path, tmp_path: Path, max_shard_bytes: int
) -> None:
    out = tmp_path / "out"
    table = weight_table(json.loads((source / "config.json").read_text()))
    writer = HfWriter.create(
        out,
        table=table,
        source_dir=source,
        dtype=torch.float32,
        max_shard_bytes=max_shard_bytes,
    )
    context = multiprocessing.get_context("fork")
    other = context.Process(target=export_as_attached_rank, args=(source, out, table))
    other.start()
    export_shards(source, writer, table, [0])
    other.join(timeout=60)
    assert other.exitcode == 0
    assert not out.exists()
    writer.commit()

    tokens = torch.arange(20).view(2, 10)
    logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (source, out)]
    assert torch.equal(*logits)
    with HfCheckpoint.open(out) as checkpoint:
        checkpoint.check(table)
    sharded = (out / "model.safetensors.index.json").exists()
    assert sharded == (max_shard_bytes == 10_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_side_files_are_copied_and_the_dtype_is_updated(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    (source / "old.safetensors.index.json").write_text("{}")
    arguments = {"table": weight_table(config), "source_dir": source, "dtype": torch.bfloat16}
    HfWriter.create(tmp_path / "out", **arguments).commit()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "out" / "merges.txt").read_text() == "content of merges.txt"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    HfWriter.create(tmp_path / "code", **arguments, copy_code=True).commit()
    assert (tmp_path / "code" / "modeling.py").exists()


EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def carrying(source: Path) -> tuple[Path, WeightTable]:
    """A source with tensors that are not trained: one of its own, two copies of the embedding, of
    which one is no longer equal."""
    weights = load_file(source / "model.safetensors")
    embedding = weights[EMBEDDING]
    weights |= {
        "further.own": torch.randn(3, 5).to(torch.float16),
        "further.same": embedding.clone(),
        "further.other": embedding + torch.eye(*embedding.shape),
    }
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    table = weight_table(json.loads((source / "config.json").read_text()))
    ignored = (
        Ignored("further.own", "why", carried=True),
        Ignored("further.*", "why", carried=True, copy_of=EMBEDDING),
    )
    return source, dataclasses.replace(table, ignored=ignored)


# From the source itself, and from the file that a Megatron checkpoint has, without the source.
@pytest.mark.parametrize("from_file", [False, True])
def test_what_is_not_trained_is_carried_over_bit_by_bit_and_copies_follow_the_training(
    carrying: tuple[Path, WeightTable], tmp_path: Path, from_file: bool
) -> None:
    source, table = carrying
    weights = load_file(source / "model.safetensors")
    file = None
    if from_file:
        file = tmp_path / "not_trained.safetensors"
        with CarriedTensors.find(HfCheckpoint.open(source), table) as carried:
            carried.save(file)
        assert sorted(load_file(file)) == ["further.other", "further.own"]
        (source / "model.safetensors").unlink()
    writer = HfWriter.create(
        tmp_path / "out", table=table, source_dir=source, carried_file=file, dtype=torch.bfloat16
    )
    trained = torch.randn(weights[EMBEDDING].shape).bfloat16()
    writer.view(EMBEDDING).copy_(trained)
    writer.commit()
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out.keys() == weights.keys()
    for name in ("further.own", "further.other"):
        assert out[name].dtype is weights[name].dtype and torch.equal(out[name], weights[name])
    assert torch.equal(out["further.same"], trained)


def test_nothing_is_dropped_if_the_source_has_lost_its_weights(
    carrying: tuple[Path, WeightTable], tmp_path: Path
) -> None:
    source, table = carrying
    (source / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"neither model\.safetensors nor"):
        HfWriter.create(tmp_path / "out", table=table, source_dir=source, dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_shards_fill_up_in_order() -> None:
    def tensors(**rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (torch.bfloat16, (count, 5)) for name, count in rows.items()}

    # 10 bytes a row, 40 bytes a file: 20 + 20 | 10 | 50 alone | 10 + 30
    plan = plan_shards(tensors(a=2, b=2, c=1, d=5, e=1, f=3), 40)
    assert [list(shard) for shard in plan] == [["a", "b"], ["c"], ["d"], ["e", "f"]]


def test_an_existing_folder_is_kept_unless_overwriting(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = weight_table(json.loads((source / "config.json").read_text()))
    arguments = {"table": table, "source_dir": source, "dtype": torch.float32}
    HfWriter.create(out, **arguments).commit()
    (out / "mark").touch()
    with pytest.raises(ConversionError, match="out exists; remove it or choose another folder"):
        HfWriter.create(out, **arguments)
    assert (out / "mark").exists()
    writer = HfWriter.create(out, **arguments, overwrite=True)
    writer.view("model.norm.weight").fill_(3.0)
    assert (out / "mark").exists()  # the old checkpoint stays until the commit
    writer.commit()
    assert not (out / "mark").exists()
    with HfCheckpoint.open(out) as checkpoint:
        assert (checkpoint.read("model.norm.weight", ()) == 3.0).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_overwriting_spares_the_source_and_foreign_folders(source: Path, tmp_path: Path) -> None:
    table = weight_table(json.loads((source / "config.json").read_text()))
    (tmp_path / "home").mkdir()
    for out in (source, tmp_path / "home"):
        with pytest.raises(ConversionError, match="is not overwritten"):
            HfWriter.create(
                out, table=table, source_dir=source, dtype=torch.float32, overwrite=True
            )


def test_a_failed_or_aborted_export_leaves_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    writer = HfWriter.create(
        out, table=weight_table(config), source_dir=source, dtype=torch.float32
    )
    writer.abort()
    huge = weight_table(config | {"vocab_size": 1 << 40})  # 2 x 141 TB
    with pytest.raises(ConversionError, match="140737"):
        HfWriter.create(out, table=huge, source_dir=source, dtype=torch.float32)
    with pytest.raises(ConversionError, match="no export is under way"):
        HfWriter.attach(out)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_remains_of_a_killed_export_do_not_survive(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = weight_table(json.loads((source / "config.json").read_text()))
    arguments = {"table": table, "source_dir": source, "dtype": torch.float32}
    # Killed: neither commit nor abort. The next run cuts the files differently.
    HfWriter.create(out, **arguments, max_shard_bytes=10_000).close()
    HfWriter.create(out, **arguments).commit()
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
