"""Every recipe fits the machine that it states."""

from pathlib import Path

import pytest

from megatron_cpgd.planning.estimate import make_plan
from megatron_cpgd.planning.machine import find_machine
from megatron_cpgd.planning.workload import assumed_lengths
from tests.helpers.layout_jobs import ALL_RECIPES, read_recipe
from tests.helpers.planning import public_model


@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_by_prediction(recipe: Path) -> None:
    config = read_recipe(recipe).config
    machine = find_machine(config.tracking.machine or "h100")
    plan = make_plan(public_model(config.model.path.name), config, machine, assumed_lengths(config))
    assert plan.fits, plan.problems
    # The comment of a recipe names its GPUs.
    stated = recipe if "Trainer:" in recipe.read_text() else recipe.with_stem(
        recipe.stem.replace("-fp8", "")
    )  # fmt: skip
    assert f"8 x {machine.name.upper()} " in stated.read_text()
