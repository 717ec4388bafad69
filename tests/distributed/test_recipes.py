"""Recipes, and random layouts of their models, against Megatron's own modules of single ranks."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from megatron_cpgd.config.fp8_checks import check_fp8_sizes
from tests.helpers.layout_jobs import (
    FP8_RECIPES,
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
    model, apart = layout.config.model.path.name.lower(), layout.config.rollout.nodes
    nodes = f"{sizes.world_size // 8}+{apart}" if apart else sizes.world_size // 8
    assert recipe.stem == f"cpgd-{model}-{nodes}n8g-{name}"
    ahead = ["cpgd_math_ahead.yaml"] if apart else []
    assert yaml.safe_load(recipe.read_text())["defaults"] == [
        "cpgd_math_moe.yaml" if mixture else "cpgd_math.yaml",
        *ahead,
    ]
    assert layout.config.run.dir.name == recipe.stem


@pytest.mark.parametrize("recipe", FP8_RECIPES, ids=lambda path: path.stem)
def test_an_fp8_recipe_is_another_one_with_other_number_formats(recipe):
    base = recipe.with_stem(recipe.stem.replace("-fp8", ""))
    assert yaml.safe_load(recipe.read_text())["defaults"] == [base.name, "cpgd_fp8.yaml"]
    layout, plain = read_recipe(recipe).config, read_recipe(base).config
    assert (layout.model, layout.parallel) == (plain.model, plain.parallel)
    assert layout.precision.recipe == "blockwise"
    assert layout.precision.engine_weights == "fp8_block"
    assert layout.algorithm.correction.type != "none"
    assert layout.run.dir.name == recipe.stem


def test_models_without_an_fp8_recipe_have_matrices_that_blocks_do_not_fit():
    made = {read_recipe(path).config.model.path.name for path in FP8_RECIPES}
    without = {
        layout.config.model.path.name: layout
        for layout in map(read_recipe, RECIPES)
        if layout.config.model.path.name not in made
    }
    # Of Qwen2.5-72B an MLP has 29568 = 3 * 7 * 11 * 128 rows, of GLM-4.5-Air 10944 = 85.5 * 128.
    assert without.keys() == {"Qwen2.5-72B", "GLM-4.5-Air"}
    for name, layout in without.items():
        for precision in ({"train": "fp8_blockwise"}, {"rollout": "fp8_block"}):
            settings = layout.config.model_dump(mode="json") | {"precision": precision}
            config = type(layout.config).model_validate(settings)
            assert list(check_fp8_sizes(layout.hf, Path(name), config)), precision


def test_a_rank_of_a_mixture_in_fp8_is_checked_without_transformer_engine():
    [recipe] = [path for path in FP8_RECIPES if "30b-a3b" in path.stem]
    layout = read_recipe(recipe)
    run_distributed(
        1, check_ranks_job, Layout(layout.config, layout.hf | {"num_hidden_layers": 2}), [9]
    )


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
