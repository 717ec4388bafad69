"""A mixture of experts trains under every layout like on one rank: one step, in fp32.

One step only: after it rounding can send a token to another expert, and the runs part for good.
The measured differences are printed: `pytest -rP tests/distributed/test_expert_layouts.py`.
"""

from typing import Any

import pytest

from tests.helpers.parity import Reference, errors, make_reference

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2_ep2": {"dp": 2, "ep": 2},
    "dp4_ep4": {"dp": 4, "ep": 4},
    "dp2_etp2": {"dp": 2, "etp": 2},
    "tp2": {"tp": 2},
    "tp2_etp2": {"tp": 2, "etp": 2},
    "tp2_ep2": {"tp": 2, "ep": 2},
    "tp2_dp2_ep2_etp2": {"tp": 2, "dp": 2, "ep": 2, "etp": 2},
    "pp2_dp2_ep2": {"pp": 2, "dp": 2, "ep": 2},
    "cp2_ep2": {"cp": 2, "ep": 2},
}
SLOW = {
    "dp4_ep2": {"dp": 4, "ep": 2},
    "tp2_dp2_ep2": {"tp": 2, "dp": 2, "ep": 2},
    "cp2_dp2_ep2": {"cp": 2, "dp": 2, "ep": 2},
    "tp2_pp2_ep2": {"tp": 2, "pp": 2, "ep": 2},
    "tp2_pp2_dp2_ep2": {"tp": 2, "pp": 2, "dp": 2, "ep": 2},
    "tp2_pp2_dp2_ep2_etp2": {"tp": 2, "pp": 2, "dp": 2, "ep": 2, "etp": 2},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    """Layer 1 is dense."""
    path = tmp_path_factory.mktemp("model")
    return make_reference(path, "qwen3_moe", steps=1, mlp_only_layers=[1])


@pytest.fixture(scope="module")
def glm(tmp_path_factory) -> Reference:
    """Sigmoid scores with a bias, shared experts; the first layer is dense.

    Without the bias of keys: where they are not rotated its gradient is 0 up to rounding, of which
    Adam's first step makes an update of any size.
    """
    path = tmp_path_factory.mktemp("glm")
    return make_reference(path, "glm4_moe", steps=1, attention_bias=False)


def check(
    reference: Reference, parallel: dict[str, Any], norm_limit: float = 1e-5, **sections: Any
) -> None:
    logprobs, norm, update = errors(reference.train(parallel, **sections), reference)
    assert logprobs < 1e-4
    assert norm < norm_limit
    assert update < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_equals_that_of_one_rank(reference, layout):
    check(reference, LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW)
def test_a_step_on_many_ranks_equals_that_of_one(reference, layout):
    check(reference, SLOW[layout])


@pytest.mark.parametrize("layout", ["dp2_ep2", "tp2_dp2_ep2_etp2"])
def test_a_step_with_the_gathering_dispatcher_equals_that_of_one_rank(reference, layout):
    options = {"moe_token_dispatcher_type": "allgather"}
    model = {"path": reference.path, "megatron": options}
    check(reference, LAYOUTS[layout], model=model)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Reference:
    """Latent attention; the choice of experts is limited to groups."""
    return make_reference(tmp_path_factory.mktemp("deepseek"), "deepseek_v3", steps=1)


def layouts(*usual: str) -> list[Any]:
    """All layouts; those that are not usual are slow."""
    marks = {name: () if name in usual else pytest.mark.slow for name in LAYOUTS | SLOW}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


@pytest.mark.parametrize("layout", layouts("tp2_dp2_ep2_etp2", "cp2_ep2"))
def test_a_step_with_latent_attention_equals_that_of_one_rank(deepseek, layout):
    check(deepseek, (LAYOUTS | SLOW)[layout])


def test_so_does_one_whose_queries_have_no_latent(tmp_path):
    check(make_reference(tmp_path, "deepseek_v3", steps=1, q_lora_rank=None), LAYOUTS["tp2_ep2"])


@pytest.mark.parametrize("layout", layouts("tp2_dp2_ep2_etp2", "pp2_dp2_ep2"))
def test_a_step_with_shared_experts_equals_that_of_one_rank(glm, layout):
    check(glm, (LAYOUTS | SLOW)[layout])


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Reference:
    """Sinks, biases of o_proj, routers and experts; windows shorter than the sequences."""
    return make_reference(tmp_path_factory.mktemp("gpt_oss"), "gpt_oss", steps=1)


SINKS_OF_HALF_THE_HEADS = 2e-6
"""The gradient norm without them is off by 4e-6."""
GPT_OSS: dict[str, dict[str, Any]] = {
    "tp2_dp2_ep2_etp2": {"tp": 2, "dp": 2, "ep": 2, "etp": 2},
    "cp2": {"cp": 2},
}
GPT_OSS_SLOW = {
    "tp2_ep2": {"tp": 2, "ep": 2},
    "tp2": {"tp": 2},
    "tp4_ep2": {"tp": 4, "ep": 2},
    "dp2_ep2": {"dp": 2, "ep": 2},
    "dp2_etp2": {"dp": 2, "etp": 2},
    "tp2_etp2": {"tp": 2, "etp": 2},
    "pp2": {"pp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "tp2_cp2": {"tp": 2, "cp": 2},
}


@pytest.mark.parametrize("layout", GPT_OSS)
def test_a_step_with_sinks_windows_and_biases_equals_that_of_one_rank(gpt_oss, layout):
    check(gpt_oss, GPT_OSS[layout], SINKS_OF_HALF_THE_HEADS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", GPT_OSS_SLOW)
def test_so_it_is_under_further_layouts(gpt_oss, layout):
    check(gpt_oss, GPT_OSS_SLOW[layout], SINKS_OF_HALF_THE_HEADS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "tp2_cp2"])
def test_so_it_is_with_padded_batches_and_recomputation(gpt_oss, layout):
    batch = {"format": "padded", "tokens_per_micro_batch": 64}
    model = {"path": gpt_oss.path, "recompute": "full"}
    check(gpt_oss, GPT_OSS_SLOW[layout], batch=batch, model=model)


def test_padded_batches_train_experts_like_packed_ones(reference):
    batch = {"format": "padded", "tokens_per_micro_batch": 64}
    check(reference, LAYOUTS["dp2_ep2"], batch=batch)


def test_recompute_changes_no_bit_of_the_gradient(reference):
    model = {"path": reference.path, "recompute": "full"}
    run = reference.train(LAYOUTS["dp2_ep2"], model=model)
    assert run.grad_norms == reference.plain(LAYOUTS["dp2_ep2"]).grad_norms
