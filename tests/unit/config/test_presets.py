from typing import get_args

import pytest

from megatron_cpgd.config.algorithm import (
    AlgorithmConfig,
    ConstantClip,
    LogRatioTerm,
    NoClip,
    RatioTerm,
)
from megatron_cpgd.config.checks import check_config
from megatron_cpgd.config.load import load_config, read_config, save_config
from megatron_cpgd.config.merge import merge
from megatron_cpgd.config.presets import PRESETS, PresetName
from megatron_cpgd.errors import ConfigError


def test_the_names_are_those_of_the_table():
    assert set(get_args(PresetName)) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration_that_is_accepted(run_yaml, name):
    config = read_config(run_yaml, [f"algorithm.preset={name}"])
    assert check_config(config) == []
    assert config.algorithm == AlgorithmConfig(preset=name)


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_preset_loads_back_equal(run_yaml, name):
    config = load_config(run_yaml, [f"algorithm.preset={name}"])
    save_config(config, run_yaml.parent / "saved.yaml")
    assert load_config(run_yaml.parent / "saved.yaml") == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_nothing_that_is_the_default(name):
    settings = PRESETS[name].settings
    defaults = AlgorithmConfig().model_dump()
    for key, value in settings.items():
        assert merge(defaults[key], value) != defaults[key], f"{name}: {key}"


def test_all_presets_differ():
    unnamed = [AlgorithmConfig(preset=n).model_dump_json(exclude={"preset"}) for n in PRESETS]
    assert len(set(unnamed)) == len(unnamed)


def test_without_a_preset_the_method_is_cpgd():
    algorithm = AlgorithmConfig()
    assert algorithm == AlgorithmConfig(preset="cpgd")
    assert (algorithm.policy, algorithm.clip) == (LogRatioTerm(), ConstantClip(low=0.2, high=0.2))
    assert (algorithm.drift.coef, algorithm.drift.gradient_clip) == (0.01, 2.0)
    assert (algorithm.prompt_weight.type, algorithm.aggregation.type) == ("std", "group_token_mean")
    assert algorithm.correction.type == "none" and algorithm.reference.coef == 0


def test_the_settings_of_the_user_lie_over_the_preset(run_yaml):
    overrides = ["algorithm.preset=dapo", "algorithm.clip.high=0.3", "algorithm.policy.dual_clip=4"]
    algorithm = load_config(run_yaml, overrides).algorithm
    assert algorithm.clip == ConstantClip(low=0.2, high=0.3)
    assert algorithm.policy == RatioTerm(type="ratio", dual_clip=4.0)
    assert algorithm.aggregation.type == "token_mean"
    pg = load_config(run_yaml, ["algorithm.preset=dapo", "algorithm.clip={type: none}"]).algorithm
    assert pg.clip == NoClip(type="none")


def test_sections_given_as_objects_lie_over_the_preset_too():
    algorithm = AlgorithmConfig(preset="dapo", clip=NoClip(type="none"))
    assert algorithm.clip == NoClip(type="none") and algorithm.policy.type == "ratio"


@pytest.mark.parametrize("name", ["ppo", "[cpgd]", "null"])
def test_an_unknown_preset_is_one_problem(run_yaml, name):
    with pytest.raises(ConfigError, match=r"1 problem\n.*algorithm\.preset: must be 'cpgd', 'cpg'"):
        load_config(run_yaml, [f"algorithm.preset={name}"])
