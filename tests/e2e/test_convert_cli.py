"""`megatron-cpgd convert` in both directions, on an initial model and on a training checkpoint."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_cpgd.cli import main
from tests.helpers.full_run import run_cli


def convert(direction, source, target, *options):
    return run_cli("convert", direction, source, target, *options, folder=target.parent)


def prepare(assets, folder):
    """The initial model there and back."""
    return lambda: (
        folder,
        convert("hf-to-megatron", assets / "model", folder / "megatron", "--dtype", "fp32"),
        convert("megatron-to-hf", folder / "megatron", folder / "back", "--max-shard-gb", "0.0002"),
    )


@pytest.fixture(scope="module")
def folders(prepared, complete_run):
    """The same, and the last training checkpoint."""
    folder, *results = prepared
    trained = complete_run.dir / "checkpoints" / "step_000006"
    for result in (*results, convert("megatron-to-hf", trained, folder / "trained")):
        assert result.code == 0, result.err
    return folder


def read_tensors(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_equal_tensors(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def test_there_and_back_changes_no_bit(assets, folders):
    assert len(list(folders.joinpath("back").glob("*.safetensors"))) > 1  # shards of 200 kB
    assert_equal_tensors(read_tensors(assets / "model"), read_tensors(folders / "back"))


def test_tokenizer_and_chat_template_come_along(assets, folders):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folders / "back" / name).read_bytes() == (assets / "model" / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folders / "back")
    assert tokenizer.decode(tokenizer.encode("62-37=")) == "62-37="


def test_transformers_computes_the_same_with_the_converted_model(assets, folders):
    token_ids = torch.tensor([[7, 8, 9, 10]])
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(token_ids).logits
        for path in (assets / "model", folders / "back")
    ]
    assert torch.equal(*logits)


def test_a_training_checkpoint_converts_to_what_the_run_exported(complete_run, folders):
    exported = complete_run.dir / "hf" / "step_000006"
    assert_equal_tensors(read_tensors(exported), read_tensors(folders / "trained"))
    names = {path.name for path in exported.iterdir()}
    assert {path.name for path in (folders / "trained").iterdir()} == names


def test_an_existing_target_is_refused(assets, folders, capsys):
    before = state(folders)
    for direction, source, target in (
        ("hf-to-megatron", assets / "model", folders / "megatron"),
        ("megatron-to-hf", folders / "megatron", folders / "back"),
    ):
        assert main(["convert", direction, str(source), str(target)]) == 2
        assert f"{target} exists" in capsys.readouterr().err
    assert state(folders) == before


def test_a_checkpoint_without_manifest_is_refused(folders, tmp_path, capsys):
    broken = shutil.copytree(folders / "megatron", tmp_path / "broken")
    (broken / "MANIFEST.json").unlink()
    assert main(["convert", "megatron-to-hf", str(broken), str(tmp_path / "hf")]) == 2
    message = f"{broken}: not a complete checkpoint, it has no MANIFEST.json"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def state(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_disk_that_does_not_take_the_checkpoint_is_one_message(assets, tmp_path):
    command = [sys.executable, "-m", "megatron_cpgd.cli", "convert", "hf-to-megatron"]
    # No file of more than 100 KiB, as on a disk or a quota that is full; the weights take 320 kB.
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command]
    result = subprocess.run(
        [*limited, assets / "model", tmp_path / "out"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 3, result.stderr
    *_, message = result.stderr.splitlines()
    assert message.startswith(
        f"megatron-cpgd convert: {tmp_path / 'out'}: the checkpoint was not w"
    )
    assert "GB were free there. If its disk or quota is full, make room" in message
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
