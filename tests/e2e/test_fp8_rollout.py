"""A run whose engine has FP8 weights: two tensor-parallel ranks, vLLM with the emulated kernel."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_cpgd.weight_sync import shared_memory
from megatron_cpgd.weight_sync.arena import quantized_checkpoint
from tests.helpers.full_run import read_rows, run_cli, settings, write_yaml


def prepare(assets, folder):
    """(output folder, what the command left, its configuration) of three steps."""
    shutil.copytree(assets, folder, dirs_exist_ok=True)
    assets = folder
    # vLLM wants parts of 128 rows; each rank's shard ends inside a block.
    config = AutoConfig.from_pretrained(assets / "model")
    config.num_key_value_heads, config.intermediate_size = 4, 384
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(assets / "model")
    content = settings(assets)
    content["run"] = {"dir": str(folder / "run"), "steps": 3}
    content["precision"] = {"train": "fp32", "rollout": "fp8_block"}
    content["checkpoint"] = {"every": 3, "export_every": 1}
    content["algorithm"]["correction"] = {"type": "truncate"}
    yaml = write_yaml(folder / "run.yaml", content)
    return lambda: (folder / "run", run_cli("train", yaml, folder=folder), yaml)


@pytest.fixture(scope="module")
def fp8_run(prepared):
    return prepared


@pytest.fixture(scope="module")
def rows(fp8_run):
    run, finished, _ = fp8_run
    assert finished.code == 0, finished.err
    return read_rows(run / "metrics.jsonl")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_engine_holds_the_quantised_export_of_every_step(
    fp8_run, rows, step, tmp_path, monkeypatch
):
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    with quantized_checkpoint(fp8_run[0] / "hf" / f"step_{step:06d}") as whole:
        assert whole.digest() == rows[step]["weights/digest"]
        assert whole.nbytes == rows[step]["weights/bytes"]
    assert list(tmp_path.iterdir()) == []


def test_the_weights_shrink_to_about_half_of_bf16(fp8_run, rows):
    exported = load_file(fp8_run[0] / "hf" / "step_000003" / "model.safetensors")
    linear = sum(x.numel() for name, x in exported.items() if name.endswith("_proj.weight"))
    # 2 bytes of each other number, 1 of these; a factor of 4 bytes for each block of 128 x 64.
    whole = 2 * sum(x.numel() for x in exported.values()) - linear
    assert whole < rows[3]["weights/bytes"] < whole + linear / 1000


def test_the_gap_between_trainer_and_engine_is_that_of_fp8(rows):
    # fp32 on both sides: below 1e-5.
    for row in rows[1:]:
        assert 1e-3 < row["rollout/logprob_abs_diff_mean"] < 0.2
        assert 0.9 < row["rollout/correction_mean"] < 1.1


@pytest.mark.slow  # starts a second engine
def test_the_export_evaluates_as_the_engine_did(fp8_run, rows):
    run, _, yaml = fp8_run
    model = run / "hf" / "step_000003"
    evaluated = run_cli("eval", yaml, f"--model={model}", folder=run.parent)
    assert evaluated.code == 0, evaluated.err
    metrics = json.loads(evaluated.out.splitlines()[-1])
    assert metrics["eval/heldout/accuracy"] == rows[3]["eval/heldout/accuracy"]
