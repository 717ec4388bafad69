"""The export writes every element of every tensor once, whoever holds it."""

import pytest

from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config
from tests.helpers.weight_jobs import incomplete_export_job, written_job

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "dp2": {"dp": 2},
    "cp2": {"cp": 2},
    "tp2": {"tp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "tp2_dp2": {"tp": 2, "dp": 2},
    "pp2_cp2": {"pp": 2, "cp": 2},
}


@pytest.fixture(scope="module", params=["qwen2_tied", "qwen3"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    architecture, _, tied = request.param.partition("_")
    save_tiny_model(path, architecture, tie_word_embeddings=bool(tied))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_element_is_written_by_exactly_one_rank(model, layout):
    config = tiny_config(model, parallel=LAYOUTS[layout])
    by_rank = run_distributed(config.parallel.world_size, written_job, config)
    for name in by_rank[0]:
        writers = sum(written[name].int() for written in by_rank)
        assert (writers == 1).all(), f"{name}: {writers.unique().tolist()} writers"
    elements = [sum(int(mask.sum()) for mask in written.values()) for written in by_rank]
    print(f"{layout}: elements by rank {elements}")
    # Replicas share the work: none of them writes (nearly) everything.
    assert max(elements) < 0.75 * sum(elements)


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_a_parameter_that_nobody_wrote_is_named_on_every_rank(model, layout):
    config = tiny_config(model, parallel=LAYOUTS[layout])
    messages = run_distributed(2, incomplete_export_job, config, "decoder.final_layernorm.weight")
    expected = "incomplete export: 1 problem(s)\n  model.norm.weight: 0 of 64 elements written"
    assert messages == [expected, expected]
