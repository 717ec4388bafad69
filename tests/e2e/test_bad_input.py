"""Mistakes of the user: one message that says what to do, exit code 2, and nothing is written."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpgd.cli import main
from tests.helpers.full_run import Command, settings, write_yaml


@dataclass(frozen=True, slots=True)
class Workplace:
    """A valid run with a model and data of its own, to be spoilt."""

    folder: Path
    yaml: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


@pytest.fixture
def workplace(assets, tmp_path) -> Workplace:
    folder = shutil.copytree(assets, tmp_path / "work")
    content = settings(folder)
    content["run"]["dir"] = str(folder / "run")
    return Workplace(folder, write_yaml(folder / "run.yaml", content))


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# What `train` is given, and what its message has to contain.
SETTINGS = {
    "unknown key": (["optim.lrr=1"], ["optim.lrr: unknown setting", "did you mean 'lr'?"]),
    "wrong type": (["run.steps=many"], ["run.steps: must be an integer", "got 'many'"]),
    "several at once": (
        ["optim.lr=-1", "run.stepz=3", "parallel.tp=3"],
        ["4 problems", "optim.lr: ", "run.stepz: ", "parallel.tp=3 does not divide"],
    ),
    "layout": (
        ["parallel.tp=4"],
        ["parallel.tp=4 does not divide num_key_value_heads=2", "1 or 2"],
    ),
    "no such model": (["model.path=nowhere/model"], ["model.path=nowhere/model: no such folder"]),
    "inert switch": (["optim.min_lr=1e-3"], ["optim.min_lr=0.001 does nothing", "schedule"]),
    "context": (
        ["rollout.max_response_tokens=60"],
        ["16 + rollout.max_response_tokens=60 = 76 exceeds max_position_embeddings=64", "lower"],
    ),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_a_wrong_setting_is_found_before_anything_starts(workplace, mistake):
    overrides, expected = SETTINGS[mistake]
    start(workplace, *overrides, expected=expected)


def test_another_number_of_processes_is_found_before_anything_starts(workplace):
    start(workplace, expected=["= 2, but WORLD_SIZE=3 processes were started"], WORLD_SIZE="3")


def start(workplace: Workplace, *overrides: str, expected: list[str], **environment: str) -> None:
    with Command(
        "train", workplace.yaml, *overrides, folder=workplace.folder, **environment
    ) as command:
        seen = set()
        while command.runs():
            seen |= command.processes().keys()
            time.sleep(0.03)
        finished = command.wait()
    assert seen == {command.pid}
    assert_refused(workplace, finished.code, finished.err, expected)


def assert_refused(workplace: Workplace, code: int, message: str, expected: list[str]) -> None:
    assert code == 2, message
    assert message.startswith("megatron-cpgd train: ")
    assert "Traceback" not in message and "exited with code" not in message
    assert message.count(expected[0]) == 1, message  # once, not once for each rank
    for text in expected:
        assert text in message
    assert not workplace.run_dir.exists()


# How the files of a run are spoilt, and what the message has to contain.
type Spoiler = Callable[[Workplace], object]


def lose_a_shard(place: Workplace) -> None:
    tensors = load_file(place.model / "model.safetensors")
    (place.model / "model.safetensors").unlink()
    save_file(tensors, place.model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {name: "model-00001-of-00002.safetensors" for name in tensors}}
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (place.model / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_the_weights(place: Workplace) -> None:
    file = place.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def resize_a_tensor(place: Workplace) -> None:
    file = place.model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(60)
    save_file(tensors, file, {"format": "pt"})


def forget_the_end_token(place: Workplace) -> None:
    edit_json(place.model / "tokenizer_config.json", eos_token=None)
    (place.model / "generation_config.json").unlink()


FILES: dict[str, tuple[Spoiler, list[str]]] = {
    "missing shard": (lose_a_shard, ["model-00002-of-00002.safetensors is missing; download it"]),
    "wrong shape": (
        resize_a_tensor,
        ["does not fit its config.json", "model.norm.weight: expected [64], file has [60]"],
    ),
    "no chat template": (
        lambda place: (place.model / "chat_template.jinja").unlink(),
        ["has no chat template; set data.chat_template=false"],
    ),
    "no end token": (forget_the_end_token, ["names an end token; set eos_token"]),
    "empty data": (lambda place: place.data.write_text(""), ["at least one row, found none"]),
    "malformed line": (
        lambda place: place.data.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt"\n'),
        ["1 of 2 lines are not JSON objects", "train.jsonl:2: "],
    ),
    "row without prompt": (
        lambda place: place.data.write_text('{"question": "1+1=", "answer": "2"}\n'),
        ["row 0: no column 'prompt'; it has ['answer', 'question'] (data.prompt_key)"],
    ),
    "fewer rows than a batch": (
        lambda place: place.data.write_text('{"prompt": "1+1=", "answer": "2"}\n'),
        ["rollout.prompts_per_step=8 exceeds the 1 prompts of the data"],
    ),
}
RANK_SETTINGS = {
    "long prompts": (
        ["data.max_prompt_tokens=12"],
        ["prompts are longer than data.max_prompt_tokens=12; raise it, or set data.too_long=drop"],
    ),
    "unknown Megatron option": (
        ["model.megatron.rotary_percentt=0.5"],
        ["model.megatron.rotary_percentt: megatron has no such option"],
    ),
    "Megatron option of ours": (
        ["model.megatron.sequence_parallel=true"],
        ["model.megatron.sequence_parallel: is set by us; use parallel.sequence_parallel"],
    ),
    "refused by Megatron": (
        ["model.megatron={cpu_offloading: true, cpu_offloading_num_layers: 99}"],
        ["Megatron-Core refuses model.megatron={'cpu_offloading': True", "layers less than 2"],
    ),
}


@pytest.fixture
def train_as_rank_0(workplace, monkeypatch, capsys):
    """Run `train` as a launcher starts rank 0, here, where the libraries are loaded already."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)

    def train(overrides: list[str], expected: list[str]) -> None:
        code = main(["train", str(workplace.yaml), "parallel.tp=1", *overrides])
        assert_refused(workplace, code, capsys.readouterr().err, expected)

    return train


@pytest.mark.parametrize("mistake", FILES)
def test_a_bad_file_is_found_before_the_engine_starts(workplace, train_as_rank_0, mistake):
    spoil, expected = FILES[mistake]
    spoil(workplace)
    train_as_rank_0([], expected)


@pytest.mark.parametrize("mistake", RANK_SETTINGS)
def test_a_setting_that_does_not_fit_is_found_before_the_engine_starts(train_as_rank_0, mistake):
    train_as_rank_0(*RANK_SETTINGS[mistake])


# Changes to the config.json of a copy of the model, and what the message has to contain.
REFERENCES: dict[str, tuple[dict, list[str]]] = {
    "another computation": (
        {"rms_norm_eps": 1e-3, "tie_word_embeddings": True},
        ["not the architecture of model.path=", "layernorm_epsilon=0.001 instead of", "tied=True"],
    ),
    "other sizes": ({"intermediate_size": 8}, ["reference does not fit its config.json"]),
    "not supported": ({"hidden_act": "gelu"}, ["config.json: hidden_act: expected silu, got gelu"]),
}


@pytest.mark.parametrize("mistake", REFERENCES)
def test_another_reference_is_found_before_the_engine_starts(workplace, train_as_rank_0, mistake):
    changes, expected = REFERENCES[mistake]
    folder = shutil.copytree(workplace.model, workplace.folder / "reference")
    edit_json(folder / "config.json", **changes)
    override = f"algorithm.reference={{coef: 0.1, path: {folder}}}"
    train_as_rank_0([override], [f"algorithm.reference.path={folder}: ", *expected])


def test_damaged_weights_are_reported_once_by_two_ranks(workplace):
    cut_the_weights(workplace)
    launch(workplace, expected=["model.safetensors: expected", "it was cut off or damaged"])


def test_a_reward_that_does_not_exist_is_reported_once(workplace):
    reward = "rewards.functions=[{type: python, path: nowhere.score}]"
    launch(workplace, reward, expected=["path 'nowhere.score': there is no module 'nowhere'"])


def test_an_option_that_does_not_exist_is_found_before_a_process_starts(workplace, capsys):
    name = "rollout.engine_args.max_num_seqz"
    code = main(["train", str(workplace.yaml), f"{name}=3"])
    expected = [f"{name}: vllm has no such option; did you mean 'max_num_seqs'?"]
    assert_refused(workplace, code, capsys.readouterr().err, expected)


def test_what_only_the_engine_refuses_is_reported_once(workplace):
    launch(
        workplace,
        "rollout.engine_args={kv_cache_dtype: fp9}",
        expected=["vLLM refuses the model or rollout.engine_args: cache_dtype: ", "got 'fp9'"],
    )


def launch(workplace: Workplace, *overrides: str, expected: list[str]) -> None:
    with Command("train", workplace.yaml, *overrides, folder=workplace.folder) as command:
        finished = command.wait()
        command.wait_until_nothing_runs(60)
    assert_refused(workplace, finished.code, finished.err, expected)
    assert finished.out == ""
