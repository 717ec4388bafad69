"""Layouts of real models, and the ranks of layouts without their processes."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from megatron_cpgd.config.checks import check_config
from megatron_cpgd.config.load import load_config
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConversionError
from megatron_cpgd.policy.dry_run import check_rank, placement

MODELS = Path("configs/models")
ALL_RECIPES = sorted(Path("configs").glob("cpgd-*.yaml"))
RECIPES = [path for path in ALL_RECIPES if "-fp8-" not in path.stem]
FP8_RECIPES = [path for path in ALL_RECIPES if "-fp8-" in path.stem]
"""Each inherits one of the others, and with it the layout."""


@dataclass(frozen=True)
class Layout:
    """A configuration whose model has no files but config.json."""

    config: ExperimentConfig
    hf: dict[str, Any]


def read_recipe(path: Path) -> Layout:
    """A recipe with the shipped config.json of the model that its `model.path` ends in."""
    folder = MODELS / _model_name(path)
    config = load_config(path, model_config=folder)
    return Layout(config, json.loads((folder / "config.json").read_text()))


def _model_name(path: Path) -> str:
    settings = yaml.safe_load(path.read_text())
    if "model" in settings:
        return Path(settings["model"]["path"]).name
    return _model_name(path.parent / settings["defaults"][0])


def random_layout(recipe: Layout, random: Random, folder: Path, *, layers: int = 6) -> Layout:
    """Any layout that the checks let pass, of a model with as few layers; `folder` is scratch."""
    hf = recipe.hf | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(hf))
    settings = recipe.config.model_dump(mode="json")
    while True:
        settings["parallel"] = _random_sizes(random, layers)
        config = ExperimentConfig.model_validate(settings)
        if config.parallel.world_size <= 4096 and not check_config(config, folder):
            return Layout(config, hf)


def _random_sizes(random: Random, layers: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        name: random.choice(range(1, most + 1))
        for name, most in {"pp": 4, "vpp": 2, "cp": 4, "dp": 16}.items()
    }
    sizes |= {name: 2 ** random.randrange(most) for name, most in {"tp": 6, "etp": 3}.items()}
    sizes["ep"] = random.choice((1, 2, 4, 8, 16, 32, 64))
    stages = sizes["pp"] * sizes["vpp"]
    if 1 < stages <= layers and random.random() < 0.7:
        cuts = [0, *sorted(random.sample(range(1, layers), stages - 1)), layers]
        sizes["stage_layers"] = [end - start for start, end in pairwise(cuts)]
    return sizes


def check_ranks_job(layout: Layout, ranks: list[int] | None) -> dict[int, int]:
    """Elements of each of the ranks, by default of all that differ, after checking them all."""
    if dist.is_initialized():
        dist.destroy_process_group()  # the job's own: the rank is one of many that do not exist
    expected = placement(layout.config, layout.hf)
    expected.check()
    if ranks is None:
        ranks = expected.distinct_ranks()
    return {rank: check_rank(layout.config, layout.hf, expected, rank) for rank in ranks}


def compare_job(built: Layout, expected: Layout, rank: int) -> str:
    """The message about a rank of one layout that is to be a rank of another one."""
    dist.destroy_process_group()
    with pytest.raises(ConversionError) as error:
        check_rank(built.config, built.hf, placement(expected.config, expected.hf), rank)
    return str(error.value)


def check_layouts_job(layouts: list[tuple[Layout, int]]) -> None:
    """One rank of each layout."""
    for layout, rank in layouts:
        try:
            check_ranks_job(layout, [rank])
        except Exception as error:
            raise AssertionError(f"{layout.config.parallel}, rank {rank}: {error}") from error
