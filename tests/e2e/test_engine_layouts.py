"""What vLLM's own loaders take of each tensor, on every rank of an engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.layout_jobs import ALL_RECIPES, MODELS, read_recipe

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_an_engine_takes_every_element_of_models_with_few_layers(tmp_path):
    run("tests.e2e.inside_engine_layouts", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(path.name for path in MODELS.iterdir() if path.is_dir()))
def test_the_engines_of_a_hundred_random_layouts_take_every_element(model, tmp_path):
    print(run("tests.e2e.inside_engine_layouts", tmp_path, model, 100).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=lambda path: path.stem)
def test_the_engine_of_a_recipe_takes_every_element(recipe):
    layout = read_recipe(recipe)
    size = layout.config.rollout.engine_args.get("tensor_parallel_size", 1)
    model = MODELS / layout.config.model.path.name
    command = ["verify-layout", recipe, "--model-config", model, "--engine"]
    lines = run("megatron_cpgd.cli", *command).splitlines()
    assert f"each element is taken by the {size} ranks of the engine" in lines[0]
    assert all(line.endswith("all of them filled") for line in lines[1:]) and len(lines) == 1 + size
