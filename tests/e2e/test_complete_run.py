"""One run of the whole system: two Megatron-Core ranks, vLLM, reward workers."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_cpgd.config.load import load_config
from megatron_cpgd.weights.tensor_file import TensorFile
from tests.helpers.full_run import ROOT, read_rows

STEPS = range(1, 7)


@pytest.fixture(scope="module")
def rows(complete_run):
    return read_rows(complete_run.dir / "metrics.jsonl")


def test_the_command_succeeds_and_prints_a_line_for_each_step(complete_run):
    assert complete_run.finished.code == 0, complete_run.finished.err
    for step in range(7):
        assert f"step {step}/6" in complete_run.finished.out
    assert "Traceback" not in complete_run.finished.err


def test_the_output_folder_is_complete(complete_run):
    names = {path.name for path in complete_run.dir.iterdir()}
    assert names == {
        "config.yaml", "machine.yaml", "versions.json", "metrics.jsonl", "learning_curve.png",
        "rollouts", "checkpoints", "hf", "logs", "run.lock",
    }  # fmt: skip
    saved = [f"step_{step:06d}" for step in (2, 4, 6)]
    assert sorted(path.name for path in (complete_run.dir / "hf").iterdir()) == saved
    checkpoints = complete_run.dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", *saved]
    assert (checkpoints / "latest").read_text() == "step_000006\n"
    logs = {path.name for path in (complete_run.dir / "logs").iterdir()}
    assert logs == {"rank_0.log", "rank_1.log", "engine.log"}


def test_the_saved_configuration_is_the_one_that_ran(complete_run):
    assert load_config(complete_run.dir / "config.yaml") == load_config(complete_run.yaml)


def test_the_versions_of_all_that_ran_are_known(complete_run):
    versions = json.loads((complete_run.dir / "versions.json").read_text())
    for name in ("python", "torch", "megatron_core", "vllm", "transformers", "git_commit"):
        assert versions[name] != "absent", name


def test_each_step_has_one_row_and_every_documented_metric(rows):
    assert [row["step"] for row in rows] == list(range(7))
    names = {name for row in rows for name in row} - {"step"}
    _, text = (ROOT / "docs" / "output.md").read_text().split("\n## Metrics\n")
    text, *_ = text.split("\n## ")  # what a study writes comes behind
    documented = {
        name.replace("eval/<name>", "eval/heldout").replace("<name>", "format")
        for name in re.findall(r"^\| `([a-z]+/[^`]+)` \|", text, flags=re.MULTILINE)
    }
    # No step was skipped or collapsed; no correction, rejection, mask, balanced clip, replay,
    # overlap, piece or engine node is set, there are no experts. The peak of a CPU is not known.
    absent = {
        "policy/skipped_reason",
        "policy/clip_low",
        "policy/clip_high",
        "perf/mfu",
        "time/wait_s",
        "time/background_s",
        "time/routing_s",
        "time/sleep_s",
        "time/reload_s",
    } | {
        name
        for name in documented
        if name.startswith(
            (
                "rollout/correction_",
                "rollout/rejected_",
                "rollout/masked_",
                "rollout/older_",
                "router/",
                "routing/",
                "stability/",
                "weights/network_",
            )
        )
    }
    assert names == documented - absent


def test_the_parts_of_a_step_add_up_to_its_seconds(rows):
    for row in rows[1:]:
        parts = [row[name] for name in row if name.startswith("time/") and "total" not in name]
        assert sum(parts) == pytest.approx(row["time/total_s"])
        assert all(part >= 0 for part in parts)


def test_every_response_comes_from_the_weights_of_the_step_before(complete_run):
    for step in STEPS:
        rollouts = read_rows(complete_run.dir / "rollouts" / f"step_{step:06d}.jsonl")
        assert len(rollouts) == 32  # 8 prompts, 4 responses each
        assert {rollout["weight_version"] for rollout in rollouts} == {step - 1}


def test_trainer_and_engine_agree_on_every_log_prob(rows):
    for row in rows[1:]:
        assert row["rollout/logprob_abs_diff_mean"] <= 1e-5
        assert row["rollout/logprob_abs_diff_max"] <= 1e-4


def test_the_reference_is_the_policy_before_the_first_step(rows):
    assert rows[1]["reference/kl_k1"] == rows[1]["reference/kl_k3"] == 0
    assert all(row["reference/kl_k3"] > 0 for row in rows[2:])


def test_the_engine_gets_new_weights_in_every_step(rows):
    assert [row["weights/version"] for row in rows[1:]] == list(STEPS)
    assert len({row["weights/digest"] for row in rows[1:]}) == len(STEPS)


def test_the_policy_learns(rows):
    # A response is rewarded for beginning with a digit, 10 of 31 tokens: one in three at first.
    assert rows[1]["reward/mean"] < 0.6
    assert rows[6]["reward/mean"] > 0.8
    assert rows[6]["eval/heldout/accuracy"] > rows[0]["eval/heldout/accuracy"]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_an_export_is_what_the_engine_held_after_that_step(complete_run, rows, step):
    file = complete_run.dir / "hf" / f"step_{step:06d}" / "model.safetensors"
    with TensorFile.open(file) as exported:
        assert exported.digest() == rows[step]["weights/digest"]


def test_transformers_loads_the_export_with_tokenizer_and_chat_template(complete_run):
    folder = complete_run.dir / "hf" / "step_000006"
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "1+1="}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("step", [2, 4, 6])
def test_the_manifest_is_the_last_file_of_a_checkpoint(complete_run, step):
    folder = complete_run.dir / "checkpoints" / f"step_{step:06d}"
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    files = [path for path in folder.rglob("*") if path.is_file()]
    listed = {str(path.relative_to(folder)) for path in files} - {"MANIFEST.json"}
    assert manifest["files"].keys() == listed
    newest = max(path.stat().st_mtime_ns for path in files)
    assert (folder / "MANIFEST.json").stat().st_mtime_ns == newest
