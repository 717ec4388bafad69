"""Segments and boxes: worked layouts, and export as the inverse of import under every cut."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.table import (
    Entry,
    Segment,
    WeightTable,
    boxes,
    export_pieces,
    gated_mlp,
    import_tensor,
    qkv,
    rename,
    vocab,
)
from megatron_cpgd.weights.tally import check_written


def imported(
    entry: Entry, hf: dict[str, torch.Tensor], tp_rank: int, tp_size: int, shape: tuple[int, ...]
) -> torch.Tensor:
    local = torch.full(shape, -1, dtype=next(iter(hf.values())).dtype)
    read = lambda name, index: hf[name][index]  # noqa: E731
    import_tensor(entry, local, read, tp_rank=tp_rank, tp_size=tp_size)
    return local


def test_query_groups_are_interleaved_with_their_key_and_value() -> None:
    # 4 query heads, 2 KV heads, head_dim 1: group 0 = q0 q1 k0 v0, group 1 = q2 q3 k1 v1.
    hf = {
        "q.b": torch.tensor([10, 11, 12, 13]),
        "k.b": torch.tensor([20, 21]),
        "v.b": torch.tensor([30, 31]),
    }
    entry = qkv("m", "{}.b", heads=4, kv_heads=2, head_dim=1, columns=())
    assert imported(entry, hf, 0, 1, (8,)).tolist() == [10, 11, 20, 30, 12, 13, 21, 31]
    # One group per rank at tp = 2; at tp = 4 the cut goes through the groups.
    assert imported(entry, hf, 1, 2, (4,)).tolist() == [12, 13, 21, 31]
    assert imported(entry, hf, 1, 4, (2,)).tolist() == [20, 30]


def test_each_rank_of_a_gated_mlp_holds_its_gate_rows_then_its_up_rows() -> None:
    hf = {"gate": torch.tensor([[1], [2], [3], [4]]), "up": torch.tensor([[5], [6], [7], [8]])}
    entry = gated_mlp(("m",), "gate", "up", (4, 1))
    assert imported(entry, hf, 0, 1, (8, 1)).flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert imported(entry, hf, 0, 2, (4, 1)).flatten().tolist() == [1, 2, 5, 6]
    assert imported(entry, hf, 1, 2, (4, 1)).flatten().tolist() == [3, 4, 7, 8]


def test_a_row_parallel_layer_is_cut_by_columns() -> None:
    hf = {"w": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
    entry = rename(("m",), "w", (2, 4), "columns")
    assert imported(entry, hf, 1, 2, (2, 2)).tolist() == [[3, 4], [7, 8]]


def test_experts_in_one_tensor_are_transposed_and_gate_and_up_rows_take_turns() -> None:
    # [2 experts, 3 columns, 4 rows]: hundreds name the expert, tens the column; gate rows 0 and 2.
    expert, column, row = (torch.arange(size) for size in (2, 3, 4))
    hf = {"w": 100 + 100 * expert[:, None, None] + 10 * column[:, None] + row}
    entry = gated_mlp(("m",), "w", "w", (2, 3), packed=1)
    assert imported(entry, hf, 0, 1, (4, 3))[0].tolist() == [200, 210, 220]
    assert imported(entry, hf, 0, 1, (4, 3))[:, 1].tolist() == [210, 212, 211, 213]
    # Each rank has one gate and one up row.
    assert imported(entry, hf, 1, 2, (2, 3)).tolist() == [[202, 212, 222], [203, 213, 223]]
    down = rename(("m",), "w", (4, 3), "columns", packed=0)
    assert imported(down, hf, 2, 3, (4, 1)).flatten().tolist() == [120, 121, 122, 123]
    bias = {"b": torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])}
    entry = gated_mlp(("m",), "b", "b", (2,), packed=1)
    assert imported(entry, bias, 1, 2, (2,)).tolist() == [22, 23]


def test_vocabulary_padding_is_zero_and_never_exported() -> None:
    # 5 words on 4 ranks of 2 rows: rank 2 has word 4 and one padding row, rank 3 only padding.
    hf = {"w": torch.tensor([[1], [2], [3], [4], [5]])}
    entry = vocab("m", "w", (5, 1))
    assert imported(entry, hf, 2, 4, (2, 1)).tolist() == [[5], [0]]
    assert imported(entry, hf, 3, 4, (2, 1)).tolist() == [[0], [0]]
    shard = torch.tensor([[9.0], [8.0]])
    [(name, place, values)] = export_pieces(entry, shard, tp_rank=2, tp_size=4)
    assert (name, place[0], values.tolist()) == ("w", slice(4, 5, 1), [[9]])
    assert list(export_pieces(entry, shard, tp_rank=3, tp_size=4)) == []


def test_aliases_and_replicas_are_loaded_but_exported_once() -> None:
    alias = vocab("m", "w", (2, 1), alias=True)
    norm = rename(("m",), "w", (2, 1))
    hf = {"w": torch.tensor([[1.0], [2.0]])}
    for entry in (alias, norm):
        shape = (1, 1) if entry is alias else (2, 1)
        assert imported(entry, hf, 1, 2, shape)[-1].item() == 2.0

    assert list(export_pieces(alias, torch.ones(2, 1), tp_rank=0, tp_size=1)) == []
    assert list(export_pieces(norm, torch.ones(2, 1), tp_rank=1, tp_size=2)) == []


@pytest.mark.parametrize(
    ("entry", "tp_size", "shape"),
    [
        (rename(("m",), "w", (4, 4), "columns"), 2, (4, 4)),
        (rename(("m",), "w", (4, 4), "columns"), 2, (2, 4)),
        (rename(("m",), "w", (4,)), 2, (2,)),
        (rename(("m",), "w", (4,)), 1, (4, 1)),
        # 3 + 3 rows on 2 ranks: 1.5 gate rows each
        (gated_mlp(("m",), "gate", "up", (3, 1)), 2, (3, 1)),
        (vocab("m", "w", (5, 1)), 2, (2, 1)),  # 4 rows for 5 words
    ],
)
def test_a_shard_that_is_no_even_cut_is_refused(
    entry: Entry, tp_size: int, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ConversionError, match=f"m: a shard .*tp={tp_size}"):
        boxes(entry, tp_rank=0, tp_size=tp_size, local_shape=shape)


def test_check_tiling_finds_gaps_and_overlaps() -> None:
    def table(*segments: Segment) -> WeightTable:
        entry = Entry(names=("m",), shape=(4, 2), split="rows", segments=segments)
        return WeightTable((entry,))

    table(Segment("a", 0, 2, 2), Segment("a", 2, 2, 0)).check_tiling()
    for wrong in (
        (Segment("a", 0, 3, 0),),  # Megatron row 3 is not covered
        (Segment("a", 0, 2, 0), Segment("a", 0, 2, 2)),  # rows 0 and 1 of a are used twice
        (Segment("a", 0, 2, 0), Segment("a", 3, 2, 2)),  # row 2 of a is lost
        # Two experts: rows 0 and 2 of the first twice, then those of both, but not rows 1 and 3.
        (Segment("a", 0, 2, 0, step=2, expert=0), Segment("a", 0, 2, 2, step=2, expert=0)),
        (Segment("a", 0, 2, 0, step=2, expert=0), Segment("a", 1, 2, 2, step=2, expert=1)),
    ):
        with pytest.raises(AssertionError):
            table(*wrong).check_tiling()


@st.composite
def model_configs(draw: st.DrawFn) -> dict[str, Any]:
    """config.json of a random small model whose sizes tp = 4 divides."""
    kv_heads = draw(st.sampled_from([4, 8]))
    heads = kv_heads * draw(st.integers(1, 3))
    config: dict[str, Any] = {
        "model_type": draw(st.sampled_from(["llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss"])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * draw(st.integers(1, 3)),
        "intermediate_size": 4 * draw(st.integers(1, 5)),
        "vocab_size": draw(st.integers(1, 40)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "num_experts": draw(st.integers(1, 3)),
        "moe_intermediate_size": 4 * draw(st.integers(1, 3)),
        "num_local_experts": draw(st.integers(1, 3)),
        "decoder_sparse_step": draw(st.integers(1, 2)),
    }
    if config["model_type"] == "qwen3" or draw(st.booleans()):
        config["head_dim"] = draw(st.integers(1, 4))
    return config


def shard_shape(entry: Entry, tp_size: int) -> tuple[int, ...]:
    """Shape of a shard, as Megatron would make it; the vocabulary padded to 8 rows per rank."""
    shape = list(entry.shape)
    if entry.padded:
        shape[0] = -(-shape[0] // (8 * tp_size)) * 8 * tp_size
    if entry.split != "replicated":
        shape[0 if entry.split == "rows" else 1] //= tp_size
    return tuple(shape)


def numbered(table: WeightTable) -> dict[str, torch.Tensor]:
    """Every element of every HF tensor is another number > 0."""
    tensors, start = {}, 1
    for name, shape in table.hf_shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + size).view(shape)
        start += size
    return tensors


@settings(max_examples=60, deadline=None)
@given(config=model_configs(), tp_size=st.sampled_from([1, 2, 4]))
def test_export_is_the_inverse_of_import_and_complete(config: dict[str, Any], tp_size: int) -> None:
    table = weight_table(config)
    table.check_tiling()
    hf = numbered(table)
    out = {name: torch.zeros_like(tensor) for name, tensor in hf.items()}
    written: Counter[str] = Counter()
    for entry in table.entries:
        shape = shard_shape(entry, tp_size)
        for rank in range(tp_size):
            local = imported(entry, hf, rank, tp_size, shape)
            assert (local >= 0).all(), entry.name
            for name, place, values in export_pieces(entry, local, tp_rank=rank, tp_size=tp_size):
                out[name][place].copy_(values)
                written[name] += values.numel()
    for name, tensor in hf.items():
        assert torch.equal(out[name], tensor), name
    check_written(table.hf_tensors(torch.float32), written)


@settings(max_examples=30, deadline=None)
@given(config=model_configs())
def test_shards_put_together_are_the_tensor_of_one_rank(config: dict[str, Any]) -> None:
    table = weight_table(config)
    hf = numbered(table)
    for entry in table.entries:
        whole = imported(entry, hf, 0, 1, entry.shape)
        shards = [imported(entry, hf, rank, 4, shard_shape(entry, 4)) for rank in range(4)]
        if entry.split == "replicated":
            merged = shards[3]
        elif entry.split == "columns":
            merged = torch.cat(shards, dim=1)
        else:
            halves = [shard.chunk(entry.stride) for shard in shards]
            merged = torch.cat([half[i] for i in range(entry.stride) for half in halves])
        assert torch.equal(merged[: len(whole)], whole), entry.name


def test_an_unknown_parameter_is_named() -> None:
    table = WeightTable((rename(("m",), "w", (2,)),))
    with pytest.raises(ConversionError, match=r"mlp\.router\.weight has no Hugging Face"):
        table.entry("decoder.layers.0.mlp.router.weight")
