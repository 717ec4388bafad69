"""The folder that the demo trains from; a two-step warm-up stands for the real one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_cpgd.config.load import load_config
from megatron_cpgd.demo.arithmetic import Problem
from megatron_cpgd.demo.assets import STAMP, make_assets
from megatron_cpgd.demo.model import accuracy
from megatron_cpgd.demo.recipe import DENSE, MOE, Recipe, WarmupSettings
from megatron_cpgd.demo.warmup import respond
from megatron_cpgd.errors import DataError

RECIPE = Recipe(
    train=64, heldout=16, examples_per_problem=1, warmup=WarmupSettings(steps=2, batch_size=4)
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "assets"
    assert make_assets(folder, RECIPE)
    return folder


@pytest.fixture(scope="module")
def moe_assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "moe_assets"
    assert make_assets(folder, replace(RECIPE, experts=8))
    return folder


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_model_loads_in_float32_and_responds(assets):
    model = AutoModelForCausalLM.from_pretrained(assets / "model")
    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    responses = respond(model, tokenizer, ["37+58=", "62-37="], greedy=True)
    assert len(responses) == 2
    assert responses == respond(model, tokenizer, ["37+58=", "62-37="], greedy=True)


def test_generation_stops_at_the_end_token_of_the_chat_template(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    generation = GenerationConfig.from_pretrained(assets / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation.eos_token_id == tokenizer.eos_token_id == end != generation.pad_token_id


def test_experts_are_saved_under_the_names_of_released_checkpoints(moe_assets):
    stored = load_file(moe_assets / "model" / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    experts = {name: shape for name, shape in shapes.items() if ".experts." in name}
    assert experts == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": (64, 64)
        for layer in range(2)
        for expert in range(8)
        for part in ("gate", "up", "down")
    }
    assert shapes["model.layers.0.mlp.gate.weight"] == (8, 64)


def test_a_mixture_of_experts_differs_from_the_dense_demo_in_its_layers_only(assets, moe_assets):
    assert replace(MOE, experts=0) == DENSE
    for name in ("train.jsonl", "heldout.jsonl", "model/tokenizer.json"):
        assert (assets / name).read_bytes() == (moe_assets / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(moe_assets / "model")
    tokenizer = AutoTokenizer.from_pretrained(moe_assets / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(respond(model, tokenizer, ["37+58=", "62-37="], greedy=True)) == 2


def test_rows_hold_prompts_and_right_answers(assets):
    train, heldout = read_rows(assets / "train.jsonl"), read_rows(assets / "heldout.jsonl")
    assert (len(train), len(heldout)) == (64, 16)
    for row in train + heldout:
        left, op, right = row["prompt"][:2], row["prompt"][2], row["prompt"][3:5]
        expected = int(left) + int(right) if op == "+" else int(left) - int(right)
        assert row == {"prompt": f"{left}{op}{right}=", "answer": str(expected)}


def test_same_recipe_gives_the_same_bytes_and_another_seed_does_not(assets, tmp_path):
    make_assets(tmp_path / "again", RECIPE)
    make_assets(tmp_path / "other", Recipe(**{**recipe_fields(), "seed": 1}))
    stamps = [
        json.loads((folder / STAMP).read_text(encoding="utf-8"))
        for folder in (assets, tmp_path / "again", tmp_path / "other")
    ]
    assert stamps[0] == stamps[1]
    different = {name for name, d in stamps[0]["files"].items() if stamps[2]["files"][name] != d}
    assert different == {"model/model.safetensors", "train.jsonl", "heldout.jsonl"}


def test_second_call_changes_nothing_and_a_damaged_folder_is_made_again(assets):
    weights = assets / "model" / "model.safetensors"
    before, content = weights.stat().st_mtime_ns, weights.read_bytes()
    assert not make_assets(assets, RECIPE)
    assert weights.stat().st_mtime_ns == before
    weights.write_bytes(b"damaged")
    assert make_assets(assets, RECIPE)
    assert weights.read_bytes() == content


def test_other_recipe_replaces_the_folder(tmp_path):
    make_assets(tmp_path / "assets", RECIPE)
    assert make_assets(tmp_path / "assets", Recipe(**{**recipe_fields(), "train": 32}))
    assert len(read_rows(tmp_path / "assets" / "train.jsonl")) == 32
    assert [p.name for p in tmp_path.iterdir()] == ["assets"]


def test_folder_of_somebody_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="it has other contents"):
        make_assets(tmp_path, RECIPE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be made"):
        make_assets(tmp_path / "file" / "assets", RECIPE)


def test_accuracy_counts_what_follows_the_last_equals_sign():
    problems = [Problem(left=37, op="+", right=58)] * 4
    assert accuracy(["80+15=95", "80+15=85", "95", "80=1=95"], problems) == 0.5


@pytest.mark.parametrize("demo", ["demo", "demo_moe"])
def test_demo_config_fits_the_model_and_the_data(demo, assets, moe_assets, tmp_path, monkeypatch):
    config_file = Path(__file__).parents[3] / "configs" / f"{demo}.yaml"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo_assets").symlink_to(assets, target_is_directory=True)
    (tmp_path / "runs" / "demo_moe_assets").symlink_to(moe_assets, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    config = load_config(config_file)
    # The whole demo draws every prompt at most once.
    assert config.run.steps * config.rollout.prompts_per_step <= DENSE.train
    # A mini-batch of the longest sequences is one micro-batch.
    groups = config.rollout.prompts_per_step // config.algorithm.mini_batches
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    rows = groups * config.rollout.samples_per_prompt
    assert rows * longest <= config.batch.tokens_per_micro_batch


def recipe_fields():
    return {name: getattr(RECIPE, name) for name in RECIPE.__dataclass_fields__}
