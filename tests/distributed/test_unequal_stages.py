"""Pipeline stages with unequal numbers of layers train like one rank, in fp32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.parity import Reference, Run, errors, make_reference, train
from tests.helpers.policy_jobs import with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.routing_jobs import record_job
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

# Of five layers. With two chunks on each of two ranks, the first rank has layers 0, 3 and the
# second 1, 2, 4.
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"pp": 2, "stage_layers": [2, 3]},
    "pp2_vpp2": {"pp": 2, "vpp": 2, "stage_layers": [1, 2, 1, 1]},
}
REPLAY: dict[str, Any] = {"algorithm": {"routing_replay": "rollout"}}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Reference:
    path = tmp_path_factory.mktemp("dense")
    return make_reference(path, "qwen2", steps=3, num_hidden_layers=5, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Reference:
    """Trained on routes that are not those of its routers; layers 1 and 3 are dense."""
    path, other = tmp_path_factory.mktemp("experts"), tmp_path_factory.mktemp("other")
    options = {"num_hidden_layers": 5, "mlp_only_layers": [1, 3]}
    model = save_tiny_model(path, "qwen3_moe", **options)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                tensor.copy_(tensor.flip(0))
    model.save_pretrained(other)
    sequences = tiny_sequences()
    [(logprobs, routes)] = run_distributed(1, record_job, tiny_config(other, **REPLAY), sequences)
    lengths = [sequence.response_length for sequence in sequences]
    sequences = with_old_logprobs(sequences, list(logprobs.split(lengths)))
    sequences = [replace(s, routes=own) for s, own in zip(sequences, routes, strict=True)]
    run = train(path, sequences, 3, **REPLAY)
    return Reference(path, sequences, 3, run, load_file(path / "model.safetensors"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unequal_stages_train_like_one_rank(dense, layout):
    check(dense, dense.train(LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_stage_replays_the_routes_of_its_own_layers(experts, layout):
    check(experts, experts.train(LAYOUTS[layout], **REPLAY))


def check(reference: Reference, run: Run) -> None:
    logprobs, norm, update = errors(run, reference)
    assert logprobs == 0
    assert norm < 1e-5
    assert update < 1e-5
