"""A mixture of experts on two ranks that hold half of the experts each, with the routes of vLLM."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_cpgd.weights.tensor_file import TensorFile
from tests.helpers.full_run import read_rows, run_cli, settings, write_assets, write_yaml
from tests.helpers.tiny_moe_engine import split_experts

EXPERTS = 4


def prepare(_, folder):
    """Three steps, a checkpoint after each."""
    yaml = write_run(folder / "run", write_assets(folder / "assets", experts=EXPERTS))
    return lambda: (folder, run_cli("train", yaml, folder=folder))


@pytest.fixture(scope="module")
def folder(prepared):
    return prepared[0]


@pytest.fixture(scope="module")
def moe_assets(folder):
    return folder / "assets"


@pytest.fixture(scope="module")
def run_dir(prepared):
    folder, finished = prepared
    assert finished.code == 0, finished.err
    return folder / "run"


def write_run(run_dir, assets):
    content = settings(assets)
    content["run"] = {"steps": 3, "dir": str(run_dir)}
    content["parallel"] = {"dp": 2, "ep": 2}
    content["algorithm"]["routing_replay"] = "rollout"
    content["checkpoint"] = {"every": 1, "export_every": 1, "keep": 9}
    content["tracking"]["routing_every"] = 2
    return write_yaml(run_dir.with_suffix(".yaml"), content)


def exported(run_dir, step):
    return run_dir / "hf" / f"step_{step:06d}"


def test_trainer_and_engine_agree_on_every_log_prob_and_every_route(run_dir):
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert row["rollout/logprob_abs_diff_mean"] <= 1e-5
        assert row["rollout/logprob_abs_diff_max"] <= 1e-4
        assert row["routing/disagreement"] == 0


def test_a_measured_step_has_both_gaps_and_the_bytes_of_the_formula(run_dir):
    first, measured, last = read_rows(run_dir / "metrics.jsonl")[1:]
    assert "routing/free_kl_k3" not in first.keys() | last.keys()
    for kind in ("free", "replayed"):
        assert measured[f"routing/{kind}_logprob_abs_diff_max"] <= 1e-4
    assert measured["routing/free_disagreement_token_frac"] == 0
    for row in (first, measured, last):
        assert row["routing/fallback_frac"] == 0
    # One byte for each of top-2 experts in two layers and each token that was fed, then two bytes
    # and the last token of a response as well.
    rollouts = read_rows(run_dir / "rollouts" / "step_000002.jsonl")
    tokens = sum(each["prompt_tokens"] + each["response_tokens"] for each in rollouts)
    assert measured["routing/engine_bytes"] == 2 * 2 * (tokens - len(rollouts))
    assert measured["routing/trainer_bytes"] == 2 * 2 * 2 * tokens


def test_the_policy_learns(run_dir):
    rows = read_rows(run_dir / "metrics.jsonl")
    assert rows[3]["reward/mean"] > rows[1]["reward/mean"] + 0.1


def test_the_experts_of_both_ranks_are_trained(run_dir, moe_assets):
    before = load_file(moe_assets / "model" / "model.safetensors")
    after = load_file(exported(run_dir, 3) / "model.safetensors")
    assert after.keys() == before.keys()
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * EXPERTS * 3
    for name in experts:
        assert not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_export_is_what_the_engine_held_after_that_step(run_dir, step):
    rows = read_rows(run_dir / "metrics.jsonl")
    with TensorFile.open(exported(run_dir, step) / "model.safetensors") as file:
        assert file.digest() == rows[step]["weights/digest"]


def test_transformers_loads_every_expert_of_the_export(run_dir):
    stored = load_file(exported(run_dir, 3) / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(exported(run_dir, 3))
    loaded = {}
    for name, parameter in model.named_parameters():
        loaded |= split_experts(name, parameter.detach())
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


@pytest.mark.slow
def test_a_resumed_run_samples_and_learns_the_same_bit_by_bit(run_dir, moe_assets, folder):
    resumed = folder / "resumed"
    shutil.copytree(run_dir, resumed)
    (resumed / "checkpoints" / "latest").write_text("step_000002\n")
    finished = run_cli("train", write_run(resumed, moe_assets), folder=folder)
    assert finished.code == 0, finished.err
    assert "step_000002" in finished.err and "step 3/3" in finished.out
    expected, actual = (read_rows(path / "metrics.jsonl") for path in (run_dir, resumed))
    for left, right in zip(expected, actual, strict=True):
        same = {name for name in left if not name.startswith(("time/", "perf/"))}
        assert {name: left[name] for name in same} == {name: right[name] for name in same}
