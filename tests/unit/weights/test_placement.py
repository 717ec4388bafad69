"""What each rank holds, worked by hand on small models."""

import pytest

from megatron_cpgd.config.schema import ParallelConfig
from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.decoder import Decoder, Experts
from megatron_cpgd.weights.placement import Placement

MODEL = Decoder(
    vocab=10, layers=2, hidden=8, intermediate=12, heads=4, kv_heads=2, head_dim=2, tied=False,
    experts=Experts(count=6, intermediate=4, dense_layers=frozenset({0})),
)  # fmt: skip
DENSE = Decoder(
    vocab=10, layers=4, hidden=8, intermediate=12, heads=4, kv_heads=2, head_dim=2, tied=True
)


def placement(model: Decoder = MODEL, **sizes) -> Placement:
    return Placement(model, ParallelConfig(**sizes), padded_vocab=12)


def shapes(layout: Placement, rank: int) -> dict[str, tuple[int, ...]]:
    return {shard.entry.name: shard.shape for shard in layout.shards(rank)}


@pytest.mark.parametrize(
    ("etp", "places"),
    [  # of ranks 0 to 3 with tp = dp = ep = 2: (tp, replica), (etp, ep), the table in the docs
        (1, [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 0, 0), (1, 1, 0, 1)]),
        (2, [(0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 0, 1), (1, 1, 1, 1)]),
    ],
)
def test_two_grids_lie_over_the_ranks_of_a_stage(etp, places):
    layout = placement(tp=2, dp=2, ep=2, etp=etp, pp=2)
    for rank, expected in enumerate(places):
        for stage in range(2):
            at = layout.place(rank + 4 * stage)
            assert (at.tp, at.replica, at.etp, at.ep) == expected
            assert at.stage == stage


def test_shards_have_the_shapes_of_their_cut():
    layout = placement(tp=2, dp=2, ep=2, etp=2)
    mlp = "decoder.layers.1.mlp."
    found = shapes(layout, 3)  # tp 1; the second half of experts 3, 4, 5
    assert found["embedding.word_embeddings.weight"] == (6, 8)
    assert found["decoder.layers.0.self_attention.linear_qkv.weight"] == (8, 8)  # 2 * (4 + 2 + 2)
    assert found["decoder.layers.0.mlp.linear_fc1.weight"] == (12, 8)
    assert found["decoder.layers.0.mlp.linear_fc2.weight"] == (8, 6)
    assert found[f"{mlp}router.weight"] == (6, 8)
    assert found[f"{mlp}experts.local_experts.5.linear_fc1.weight"] == (4, 8)
    assert found[f"{mlp}experts.local_experts.5.linear_fc2.weight"] == (8, 2)
    experts = {name.split(".")[6] for name in found if "local_experts" in name}
    assert experts == {"3", "4", "5"}
    assert layout.distinct_ranks() == [0, 1, 2, 3]


def layers(layout: Placement, rank: int) -> set[int]:
    names = [name.split(".") for name in shapes(layout, rank)]
    return {int(parts[2]) for parts in names if parts[1] == "layers"}


def test_stages_hold_layers_in_turns_and_a_tied_head_twice():
    layout = placement(DENSE, pp=2, vpp=2)
    assert [layers(layout, rank) for rank in range(2)] == [{0, 2}, {1, 3}]
    assert "embedding.word_embeddings.weight" in shapes(layout, 0)
    assert {"output_layer.weight", "decoder.final_layernorm.weight"} <= shapes(layout, 1).keys()
    assert "output_layer.weight" not in shapes(placement(DENSE), 0)
    unequal = placement(DENSE, pp=3, stage_layers=[1, 2, 1])
    assert [layers(unequal, rank) for rank in range(3)] == [{0}, {1, 2}, {3}]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tp": 2, "cp": 3, "dp": 2},
        {"tp": 2, "dp": 3, "ep": 3, "pp": 2},
        {"dp": 4, "ep": 2, "etp": 2},
    ],
)
def test_the_ranks_together_hold_every_element_once(sizes):
    placement(**sizes).check()


def test_what_no_rank_holds_or_two_do_is_named(monkeypatch):
    layout = placement(tp=2, dp=3, ep=3)
    monkeypatch.setattr(layout, "distinct_ranks", lambda: [0, 0, 2, 3, 4, 5])
    with pytest.raises(ConversionError, match="do not hold every element once") as error:
        layout.check()
    # Rank 0 twice and 1 never: tensor-parallel part 1 of the matrices, experts 2 and 3 of the MoE.
    assert "model.embed_tokens.weight: 2 parts do not make up [10, 8]" in str(error.value)
    assert "model.layers.0.self_attn.o_proj.weight: 2 parts" in str(error.value)


def test_a_tensor_that_cannot_be_cut_equally_is_named():
    with pytest.raises(ConversionError, match=r"local_experts\.0\.linear_fc1\.weight: 3 ranks"):
        placement(tp=1, dp=3, etp=3).check()
