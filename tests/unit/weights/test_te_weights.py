"""The weight tables against the models that a GPU trains, as Transformer Engine builds them.

The list comes from tests/helpers/list_te_weights.py.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.policy.shards import iter_weights
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.table import boxes
from tests.helpers.tiny import ARCHITECTURES

LISTED = json.loads((Path(__file__).parents[2] / "data" / "te_weights.json").read_text())
CASES = {
    f"{name}-{'_'.join(f'{axis}{n}' for axis, n in layout['parallel'].items()) or 'one'}": (
        model["config"],
        layout,
    )
    for name, model in LISTED["models"].items()
    for layout in model["layouts"]
}


class ListedChunk:
    """Looks like the GPTModel chunk that was listed."""

    def __init__(self, hf: dict[str, Any], layout: dict[str, Any]) -> None:
        self._layout = layout
        self.config = SimpleNamespace(num_moe_experts=count_experts(hf))
        layers = [SimpleNamespace(layer_number=i + 1) for i in layout["layers"]]
        self.decoder = SimpleNamespace(layers=layers)

    def named_parameters(self):
        return [(name, self._empty(shape)) for name, shape in self._layout["parameters"].items()]

    def named_modules(self):
        for name in self._layout["buffers"]:
            prefix, _, own = name.rpartition(".")
            module = SimpleNamespace(
                named_buffers=lambda recurse, name=name, own=own: [
                    (own, self._empty(self._layout["buffers"][name]))
                ],
                _non_persistent_buffers_set=set(),
            )
            yield prefix, module

    def _empty(self, shape):
        return torch.empty(shape, device="meta")


def last_rank(tp: int = 1, pp: int = 1, dp: int = 1, ep: int = 1, etp: int = 1) -> ParallelInfo:
    sizes = {"tp": tp, "pp": pp, "dp": dp, "cp": 1, "ep": ep, "etp": etp}
    fields: dict[str, Any] = {f"{axis}_size": n for axis, n in sizes.items()}
    fields |= {f"{axis}_rank": n - 1 for axis, n in sizes.items()}
    world = tp * pp * dp
    return ParallelInfo(
        **fields,
        rank=world - 1,
        world_size=world,
        vpp_size=1,
        sequence_parallel=tp > 1,
        hosts=(),
    )


def count_experts(hf: dict[str, Any]) -> int:
    return hf.get("n_routed_experts") or hf.get("num_local_experts") or hf.get("num_experts") or 0


def is_held(name: str, hf: dict[str, Any], layout: dict[str, Any]) -> bool:
    """Whether the last rank has a parameter, told from its name with global indices."""
    sizes, experts = layout["parallel"], count_experts(hf)
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) not in layout["layers"]:
        return False
    expert = re.search(r"\.mlp\.experts\.linear_fc.\.weight(\d+)", name)
    if expert is not None:
        return int(expert[1]) >= experts - experts // sizes.get("ep", 1)
    return name != "embedding.word_embeddings.weight" or sizes.get("pp", 1) == 1


def test_every_architecture_is_listed_but_gpt_oss():
    assert LISTED["models"].keys() == ARCHITECTURES.keys() - {"gpt_oss"}
    assert LISTED["versions"] == {"megatron-core": "0.19.2", "transformer-engine": "2.17.1"}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_has_one_entry_and_is_an_even_cut_of_it(case):
    hf, layout = CASES[case]
    info = last_rank(**layout["parallel"])
    table = weight_table(hf)
    found = {}
    for name, tensor in iter_weights([ListedChunk(hf, layout)], info):
        entry = table.entry(name)
        assert name == entry.names[-1], "Transformer Engine's spelling is the last one"
        assert name not in found
        place = (info.etp_rank, info.etp_size) if entry.expert else (info.tp_rank, info.tp_size)
        cut = boxes(entry, tp_rank=place[0], tp_size=place[1], local_shape=tuple(tensor.shape))
        covered = sum(tensor[box.local_index].numel() for box in cut)
        assert covered == tensor.numel() or entry.padded
        found[name] = entry
    every = {entry.names[-1] for entry in table.entries}
    assert found.keys() == {name for name in every if is_held(name, hf, layout)}
