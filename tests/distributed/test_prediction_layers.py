"""Layers that predict further tokens are not trained, and no folder that we write lacks them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.model_jobs import convert_back_job, convert_job, export_job
from tests.helpers.policy_jobs import with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import add_prediction_layers, save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

EMBEDDING = "model.embed_tokens.weight"
COPIES = {
    f"model.layers.{layer}.{name}.weight": original
    for layer in (4, 5)
    for name, original in (("embed_tokens", EMBEDDING), ("shared_head.head", "lm_head.weight"))
}


def save_model(path, architecture):
    """In bf16 but for the bias of routers, as released."""
    save_tiny_model(path, architecture)
    add_prediction_layers(path)
    weights = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return weights


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


# The source is gone when the checkpoint becomes a Hugging Face folder again.
@pytest.mark.parametrize("architecture", ["glm4_moe", "deepseek_v3"])
def test_converting_there_and_back_in_bf16_changes_no_bit(tmp_path, architecture):
    source = tmp_path / "source"
    original = save_model(source, architecture)
    config = json.loads((source / "config.json").read_text())
    run_distributed(1, convert_job, source, tmp_path)
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), original)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back == config | {"dtype": "bfloat16"}


def test_a_source_that_only_announces_such_layers_converts_without_them(tmp_path):
    source = tmp_path / "source"
    save_tiny_model(source, "glm4_moe", num_nextn_predict_layers=1)
    original = load_file(source / "model.safetensors")
    run_distributed(1, convert_job, source, tmp_path)
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == original.keys()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(source tensors, run folder) after one step on two ranks."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("run")
    original = save_model(source, "deepseek_v3")
    sequences = tiny_sequences()
    old = [torch.full((sequence.response_length,), -3.0) for sequence in sequences]
    sections = {"parallel": {"dp": 2, "ep": 2}, "precision": {"train": "bf16"}}
    config = tiny_config(source, **sections)
    run_distributed(2, export_job, config, with_old_logprobs(sequences, old), folder)
    return original, folder


def test_an_export_has_the_layers_of_the_source_and_the_trained_embedding_and_head(run):
    original, folder = run
    exported = load_file(folder / "hf" / "step_000001" / "model.safetensors")
    assert exported.keys() == original.keys()
    for name, tensor in exported.items():
        if name in COPIES:
            assert torch.equal(tensor, exported[COPIES[name]])
            assert not torch.equal(tensor, original[name])
        elif name.startswith(("model.layers.4.", "model.layers.5.")):
            assert torch.equal(tensor, original[name])


@pytest.fixture
def checkpoint(run, tmp_path):
    return shutil.copytree(run[1] / "checkpoints" / "step_000001", tmp_path / "checkpoint")


def test_a_checkpoint_of_a_run_converts_to_what_the_run_exported(run, checkpoint, tmp_path):
    assert run_distributed(1, convert_back_job, checkpoint, tmp_path / "hf") == [None]
    exported = load_file(run[1] / "hf" / "step_000001" / "model.safetensors")
    assert_equal(load_file(tmp_path / "hf" / "model.safetensors"), exported)


def test_without_the_file_of_these_layers_nothing_is_written(checkpoint, tmp_path):
    file = checkpoint / "not_trained.safetensors"
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())

    def refusal():
        [message] = run_distributed(1, convert_back_job, checkpoint, tmp_path / "hf")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
        return message

    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert f"{file}: expected the digest {manifest['not_trained']}, the file has " in refusal()
    file.unlink()
    assert f"{file}: expected {len(content)} bytes, the file is missing" in refusal()
    del manifest["not_trained"], manifest["files"][file.name]
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    assert f"{checkpoint}: has no not_trained.safetensors with the layers" in refusal()
