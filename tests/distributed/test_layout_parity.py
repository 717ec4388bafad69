"""Every layout trains like one rank: same log-probs, gradient norms and updates, in fp32.

The measured differences are printed: `pytest -rP tests/distributed/test_layout_parity.py`.
"""

from typing import Any

import pytest
import torch

from tests.helpers.parity import Reference, errors, make_reference

pytestmark = pytest.mark.distributed

EXACT = ["pp2", "pp2_vpp2", "dp2"]
CLOSE = ["tp2", "tp2_no_sp", "cp2", "tp2_pp2", "tp2_pp2_dp2"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"pp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "dp2": {"dp": 2},
    "tp2": {"tp": 2},
    "tp2_no_sp": {"tp": 2, "sequence_parallel": False},
    "cp2": {"cp": 2},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_pp2_dp2": {"tp": 2, "pp": 2, "dp": 2},
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"architecture": "qwen3"},
    "qwen2_bias_tied": {"architecture": "qwen2", "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=MODELS)
def reference(request, tmp_path_factory) -> Reference:
    return make_reference(tmp_path_factory.mktemp(request.param), steps=3, **MODELS[request.param])


@pytest.mark.parametrize("layout", EXACT)
def test_pipeline_and_data_parallel_equal_one_rank_bit_by_bit(reference, layout):
    logprobs, norm, update = errors(reference.plain(LAYOUTS[layout]), reference)
    assert logprobs == 0
    assert norm < 1e-5
    assert update < 1e-5


@pytest.mark.parametrize("layout", CLOSE)
def test_tensor_and_context_parallel_equal_one_rank_up_to_rounding(reference, layout):
    logprobs, norm, update = errors(reference.plain(LAYOUTS[layout]), reference)
    assert logprobs < 1e-4
    assert norm < 1e-5
    assert update < 1e-3


@pytest.mark.parametrize("layout", ["dp2", "cp2", "tp2", "pp2_vpp2"])
def test_padded_batches_train_like_packed_ones(reference, layout):
    batch = {"format": "padded", "tokens_per_micro_batch": 64}
    logprobs, norm, update = errors(reference.train(LAYOUTS[layout], batch=batch), reference)
    assert logprobs < 1e-4
    assert norm < 1e-5
    assert update < 1e-3


# Recomputed or not, the same layout does the same arithmetic.
@pytest.mark.parametrize(
    ("layout", "recompute"), [("tp2", "full"), ("pp2_vpp2", "full"), ("tp2", "selective")]
)
def test_recompute_changes_no_bit(reference, layout, recompute):
    model = {"path": reference.path, "recompute": recompute}
    run, plain = reference.train(LAYOUTS[layout], model=model), reference.plain(LAYOUTS[layout])
    assert run.grad_norms == plain.grad_norms
    assert all(torch.equal(run.weights[name], plain.weights[name]) for name in plain.weights)


@pytest.mark.parametrize("layout", ["tp2_pp2", "cp2", "dp2"])
def test_metrics_are_those_of_the_whole_batch_on_every_layout(reference, layout):
    run = reference.plain(LAYOUTS[layout])
    for ours, theirs in zip(run.metrics, reference.run.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
