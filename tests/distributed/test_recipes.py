"""Recipes, and random layouts of their models, against Megatron's own modules of single ranks."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from tests.helpers.layout_jobs import (
    MODELS,
    RECIPES,
    Layout,
    check_layouts_job,
    check_ranks_job,
    compare_job,
    random_layout,
    read_recipe,
)
from tests.helpers.ranks import run_distributed

pytestmark = pytest.mark.distributed

recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def test_each_model_has_a_recipe():
    assert {read_recipe(path).config.model.path.name for path in RECIPES} == {
        folder.name for folder in MODELS.iterdir() if folder.is_dir()
    }


@recipes
def test_a_recipe_is_named_after_its_layout(recipe):
    layout = read_recipe(recipe)
    sizes, mixture = layout.config.parallel, "moe_intermediate_size" in layout.hf
    axes = {"tp": sizes.tp, "pp": sizes.pp, "cp": sizes.cp, "ep": sizes.ep}
    name = "".join(f"{axis}{size}" for axis, size in axes.items() if size > 1)
    model = layout.config.model.path.name.lower()
    assert recipe.stem == f"cpgd-{model}-{sizes.world_size // 8}n8g-{name}"
    assert yaml.safe_load(recipe.read_text())["defaults"] == [
        "cpgd_math_moe.yaml" if mixture else "cpgd_math.yaml"
    ]
    assert layout.config.run.dir.name == recipe.stem


@recipes
def test_ranks_of_a_recipe_hold_what_the_weight_table_says(recipe):
    layout = read_recipe(recipe)
    last = layout.config.parallel.world_size - 1
    run_distributed(1, check_ranks_job, layout, [0, last // 2, last])


@pytest.mark.slow
@recipes
def test_all_ranks_of_a_recipe_hold_what_the_weight_table_says(recipe):
    run_distributed(1, check_ranks_job, read_recipe(recipe), None, timeout_s=1200)


@recipes
def test_a_rank_of_random_layouts_holds_what_the_weight_table_says(recipe, tmp_path):
    run_distributed(1, check_layouts_job, draw(recipe, tmp_path, range(2)))


@pytest.mark.slow
@recipes
def test_so_does_a_rank_of_a_hundred_random_layouts(recipe, tmp_path):
    run_distributed(1, check_layouts_job, draw(recipe, tmp_path, range(100)), timeout_s=1200)


def test_a_rank_that_holds_something_else_is_described():
    recipe = read_recipe(Path("configs/cpgd-qwen3-8b-1n8g-tp2.yaml"))
    built, expected = (
        with_parallel(recipe, **sizes)
        for sizes in ({"tp": 2, "pp": 2}, {"tp": 1, "pp": 2, "dp": 2, "stage_layers": [19, 17]})
    )
    [message] = run_distributed(1, compare_job, built, expected, 1)
    for part in (
        "rank 1: ",
        "tp: expected place 0, Megatron has 1",
        "embedding.word_embeddings.weight: expected [151936, 4096], Megatron has [75968, 4096]",
        "decoder.layers.0.mlp.linear_fc2.weight: expected [4096, 12288], Megatron has [4096, 6144]",
    ):
        assert part in message
    [message] = run_distributed(1, compare_job, expected, with_parallel(recipe, pp=2, dp=2), 1)
    assert "decoder.layers.18.input_layernorm.weight: is not expected" in message
    [message] = run_distributed(1, compare_job, with_parallel(recipe, pp=2, dp=2), expected, 1)
    assert "decoder.layers.18.input_layernorm.weight: expected [4096], Megatron has none" in message


def with_parallel(recipe: Layout, **sizes: Any) -> Layout:
    settings = recipe.config.model_dump(mode="json") | {"parallel": sizes}
    return Layout(type(recipe.config).model_validate(settings), recipe.hf)


def draw(recipe: Path, folder: Path, numbers: range) -> list[tuple[Layout, int]]:
    """A layout for each number, and one of its ranks."""
    plain, drawn = read_recipe(recipe), []
    for number in numbers:
        random = Random(f"{recipe.stem} {number}")
        layout = random_layout(plain, random, folder)
        drawn.append((layout, random.randrange(layout.config.parallel.world_size)))
    return drawn
