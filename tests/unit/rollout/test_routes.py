import msgspec
import numpy as np
import pytest
import torch

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.rollout.routes import pack_moe_layers, pack_routes
from megatron_cpgd.rollout.transformers_engine import TransformersEngine
from megatron_cpgd.types import RouteLayout, Routes
from tests.helpers.engines import CONFIGS, random_model
from tests.helpers.tiny_moe_engine import MOE_LAYERS, NUM_EXPERTS, TOP_K, moe_config, router_choices

LAYOUT = RouteLayout(layers=[1, 4], top_k=2, num_experts=5)
EXPERTS = np.array([[[0, 4], [2, 1]], [[3, 2], [4, 0]], [[1, 0], [3, 4]]])
"""[3 rows, 2 layers, 2 experts]: those of 4 tokens."""


def test_routes_keep_every_number_and_its_place():
    routes = pack_routes(EXPERTS, LAYOUT, tokens=4)
    assert routes.tensor().dtype == torch.uint8
    assert routes.tensor().tolist() == EXPERTS.tolist()
    assert len(routes.experts) == 3 * LAYOUT.bytes_per_token == 3 * 2 * 2


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, torch.uint8), (257, torch.uint16)])
def test_numbers_above_255_take_two_bytes(num_experts, dtype):
    layout = RouteLayout(layers=[0], top_k=2, num_experts=num_experts)
    routes = pack_routes(np.array([[[num_experts - 1, 0]]]), layout, tokens=2)
    assert routes.tensor().dtype == dtype
    assert routes.tensor().tolist() == [[[num_experts - 1, 0]]]
    assert layout.bytes_per_token == 2 * dtype.itemsize


def test_the_memory_of_a_token_of_qwen3_30b_a3b_is_what_the_documentation_says():
    layout = RouteLayout(layers=list(range(48)), top_k=8, num_experts=128)
    assert layout.bytes_per_token == 384


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize(
    ("place", "experts", "error"),
    [
        ((1, 0), [3, 3], r"token 1 went to the experts \[3, 3\] in layer 1, .* 1 of 6 entries"),
        ((2, 1), [5, 4], r"token 2 went to the experts \[5, 4\] in layer 4, .* 2 different ones"),
    ],
)
def test_a_choice_that_no_router_makes_is_refused(dtype, place, experts, error):
    wrong = EXPERTS.copy()
    wrong[place] = experts
    with pytest.raises(RolloutError, match=error):
        pack_routes(wrong.astype(dtype), LAYOUT, tokens=4)


def test_a_row_that_was_never_written_is_refused():
    wrong = EXPERTS.copy()
    wrong[2] = 0
    with pytest.raises(RolloutError, match=r"token 2 went to the experts \[0, 0\] in layer 1"):
        pack_routes(wrong, LAYOUT, tokens=4)


def test_of_top_1_routes_only_the_absence_of_all_other_experts_is_refused():
    layout = RouteLayout(layers=[1, 4], top_k=1, num_experts=5)
    pack_routes(np.array([[[0], [0]], [[0], [2]]]), layout, tokens=3)
    with pytest.raises(RolloutError, match=r"token 0 went to the experts \[0\] in layer 1"):
        pack_routes(np.zeros((2, 2, 1), dtype=np.uint8), layout, tokens=3)


def test_dense_layers_are_left_out_and_must_be_zero():
    everything = np.zeros((3, 6, 2), dtype=np.uint8)
    everything[:, [1, 4]] = EXPERTS
    routes = pack_moe_layers(everything, LAYOUT, tokens=4)
    assert routes == pack_routes(EXPERTS, LAYOUT, tokens=4)
    everything[2, 3, 1] = 1
    with pytest.raises(RolloutError, match=r"outside of the MoE layers \[1, 4\], among 6 layers"):
        pack_moe_layers(everything, LAYOUT, tokens=4)


@pytest.mark.parametrize("tokens", [3, 5])
def test_a_row_for_the_last_token_and_a_missing_row_are_refused(tokens):
    with pytest.raises(
        RolloutError, match=rf"routes of {tokens} tokens: expected \[{tokens - 1}, "
    ):
        pack_routes(EXPERTS, LAYOUT, tokens=tokens)


def test_routes_survive_the_wire():
    routes = pack_routes(EXPERTS, LAYOUT, tokens=4)
    data = msgspec.msgpack.encode(routes)
    assert msgspec.msgpack.decode(data, type=Routes) == routes
    assert data.count(routes.experts) == 1, "raw bytes, not a list of numbers"


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("moe")
    model = random_model(moe_config(), seed=1)
    model.save_pretrained(directory)
    return model, TransformersEngine(directory, dtype="fp32")


def test_routes_of_the_transformers_engine_are_those_of_its_routers(moe):
    model, engine = moe
    prompts = [[3, 1, 4, 1, 5], [9, 2]]  # of unequal length: generate pads on the left
    sampling = Sampling(n=2, max_tokens=6, seed=1, stop_token_ids=[0], return_routes=True)
    for prompt, group in zip(prompts, engine.generate(prompts, sampling, version=0), strict=True):
        for rollout in group:
            expected = router_choices(model, prompt + rollout.token_ids)
            assert torch.equal(rollout.routes.tensor().long(), expected)
            assert rollout.routes.layout == RouteLayout(
                layers=MOE_LAYERS, top_k=TOP_K, num_experts=NUM_EXPERTS
            )


def test_the_transformers_engine_returns_no_routes_unasked(moe):
    [[rollout]] = moe[1].generate([[1]], Sampling(max_tokens=2, stop_token_ids=[0]), version=0)
    assert rollout.routes is None


def test_the_transformers_engine_refuses_to_invent_routes_of_a_dense_model(tmp_path):
    random_model(CONFIGS["llama"], seed=1).save_pretrained(tmp_path)
    engine = TransformersEngine(tmp_path, dtype="fp32")
    sampling = Sampling(max_tokens=2, stop_token_ids=[0], return_routes=True)
    with pytest.raises(RolloutError, match="routes of LlamaForCausalLM: it has no experts"):
        engine.generate([[1]], sampling, version=0)
