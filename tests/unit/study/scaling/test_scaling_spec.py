"""The file of a scaling study: what is refused, and which cells it stands for."""

import pytest

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.study.scaling.cells import ImpossibleError
from megatron_cpgd.study.scaling.spec import LayoutSpec, load_spec
from tests.helpers.full_run import ROOT
from tests.helpers.scaling import load_scaling_study, write_scaling_study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": [2, 1]}, "nodes: must ascend without repetition, got [2, 1]"),
        ({"batch": {}}, "batch: has neither `strong` nor `weak`"),
        ({"steps": 2, "warmup_steps": 2}, "warmup_steps=2: must leave some of steps=2"),
        ({"nodes": [2, 3], "batch": {"weak": [8]}}, "needs multiples of the first, 2; got [3]"),
        ({"layouts": [{"tp": 2}, {"tp": 2}]}, "two layouts are called tp2; give them a `name`"),
        ({"layouts": [{"search": True, "tp": 2}]}, "layouts.search: is searched for; give no"),
        ({"layouts": [{"search": True, "pp": 4}]}, "layouts.search: is searched for; give no"),
        ({"settings": {"parallel.tp": 2}}, "settings.parallel.tp: is set for each cell"),
        ({"settings": {"run.dir": "x"}}, "settings.run.dir: is set for each cell"),
        ({"nodes": [0]}, "nodes.0: Input should be greater than or equal to 1"),
        ({"what": 1}, "what: Extra inputs are not permitted"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, changes, message):
    with pytest.raises(ConfigError) as error:
        load_spec(write_scaling_study(tmp_path, **changes))
    assert message in str(error.value)


def test_a_setting_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"optim\.rate"):
        load_scaling_study(tmp_path, settings={"optim.rate": 1})


def test_a_model_that_is_not_here_cannot_run(tmp_path):
    base, model = str(tmp_path / "run.yaml"), str(ROOT / "configs/models/Qwen3-8B")
    with pytest.raises(ConfigError, match=r"models\.m\.hf_config: a model that is not here"):
        load_scaling_study(tmp_path, models={"m": {"base": base, "hf_config": model}})


def test_a_layout_is_called_by_its_sizes():
    assert LayoutSpec().label == "dp"
    assert LayoutSpec(tp=4, pp=2, ep=8).label == "tp4_pp2_ep8"
    assert LayoutSpec(search=True).label == "search"
    assert LayoutSpec(tp=4, name="mine").label == "mine"


def test_dp_fills_the_nodes_and_engines_fill_theirs(tmp_path):
    study = load_scaling_study(
        tmp_path,
        layouts=[{"tp": 4, "engine_nodes": 0.25}],
        settings={"rollout.engine_args.tensor_parallel_size": 2},
        nodes=[1, 2, 8],
    )
    alone, two, eight = study.cells.values()
    with pytest.raises(ImpossibleError, match="no node is left to the trainer"):
        _ = alone.config
    # A quarter of 2 is less than a node: one. 8 GPUs = tp 4 * dp 2; 8 / 2 engines.
    assert (two.config.parallel.dp, two.config.rollout.nodes, two.config.rollout.engines) == (
        2, 1, 4,
    )  # fmt: skip
    # Two of 8 nodes: 48 GPUs = tp 4 * dp 12; 2 * 8 / 2 engines.
    assert (eight.config.parallel.dp, eight.config.rollout.nodes) == (12, 2)
    assert (eight.config.rollout.engines, eight.gpus) == (8, 64)


def test_an_engine_does_not_cross_nodes(tmp_path):
    settings = {"rollout.engine_args.tensor_parallel_size": 16}
    study = load_scaling_study(tmp_path, layouts=[{"engine_nodes": 0.5}], settings=settings)
    with pytest.raises(ImpossibleError, match=r"tensor_parallel_size=16 is more than the 8 GPUs"):
        _ = list(study.cells.values())[1].config


def test_the_batch_of_weak_scaling_grows_with_the_nodes(tmp_path):
    study = load_scaling_study(tmp_path, batch={"strong": [64], "weak": [16]})
    strong, weak = study.series
    assert [key[2:] for key in strong.keys] == [(1, 64), (2, 64), (4, 64)]
    assert [key[2:] for key in weak.keys] == [(1, 16), (2, 32), (4, 64)]
    assert len(study.cells) == 5  # the last one belongs to both
    assert [cell.config.rollout.prompts_per_step for cell in study.cells.values()] == [
        64, 64, 64, 16, 32,
    ]  # fmt: skip


def test_a_layout_that_does_not_divide_the_gpus_is_impossible(tmp_path):
    study = load_scaling_study(tmp_path, layouts=[{"pp": 3}])
    with pytest.raises(ImpossibleError, match=r"8 GPUs .* no multiple of tp \* pp \* cp = 3"):
        _ = next(iter(study.cells.values())).config


def test_a_layout_that_does_not_divide_the_model_is_impossible(tmp_path):
    study = load_scaling_study(tmp_path, layouts=[{"pp": 8}])
    with pytest.raises(ImpossibleError, match="num_hidden_layers"):  # 36
        _ = next(iter(study.cells.values())).plan


@pytest.mark.parametrize("name", ["scaling_study_cluster.yaml", "scaling_study.yaml"])
def test_the_committed_studies_are_valid(name):
    assert load_spec(ROOT / "configs" / name)
