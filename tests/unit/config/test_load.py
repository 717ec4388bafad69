from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpgd.config.algorithm import ConstantClip, NoClip, TightToLooseClip
from megatron_cpgd.config.load import load_config, read_config, save_config
from megatron_cpgd.config.merge import merge
from megatron_cpgd.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_a_file_states_only_what_it_changes(run_yaml):
    config = load_config(run_yaml)
    assert config.run.steps == 10
    assert config.optim.lr == 1e-6
    assert config.algorithm.clip == ConstantClip()


def test_defaults_are_laid_left_to_right_then_the_file_then_the_overrides(run_yaml):
    folder = run_yaml.parent
    (folder / "base").mkdir()
    write(folder / "base" / "a.yaml", "optim: {lr: 1e-3, eps: 1e-3, beta1: 0.1, beta2: 0.1}")
    write(folder / "base" / "b.yaml", "defaults: [a.yaml]\noptim: {eps: 1e-4, beta1: 0.2}")
    top = write(
        folder / "top.yaml", "defaults: [run.yaml, base/a.yaml, base/b.yaml]\noptim: {beta1: 0.3}"
    )
    optim = load_config(top, ["optim.beta2=0.4"]).optim
    # lr from a, eps from b (later than a), beta1 from the file, beta2 from the override
    assert (optim.lr, optim.eps, optim.beta1, optim.beta2) == (1e-3, 1e-4, 0.3, 0.4)


def test_a_cycle_of_defaults_is_refused_and_shown(tmp_path):
    write(tmp_path / "a.yaml", "defaults: [b.yaml]")
    write(tmp_path / "b.yaml", "defaults: [a.yaml]")
    with pytest.raises(ConfigError, match=r"cycle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_config(tmp_path / "a.yaml")


def test_the_same_base_may_be_inherited_twice(run_yaml):
    top = write(run_yaml.parent / "top.yaml", "defaults: [run.yaml, run.yaml]")
    assert load_config(top) == load_config(run_yaml)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1", "mapping of sections, got list"), ("defaults: b.yaml", "must be a list of YAML")],
)
def test_a_file_of_the_wrong_shape_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "x.yaml", text))


def test_a_missing_base_names_the_base(tmp_path):
    with pytest.raises(ConfigError, match=r"base\.yaml: no such file"):
        load_config(write(tmp_path / "x.yaml", "defaults: [base.yaml]"))


def test_a_section_of_another_type_starts_anew(run_yaml):
    top = write(
        run_yaml.parent / "top.yaml",
        "defaults: [run.yaml]\nalgorithm: {clip: {type: tight_to_loose, low: 0.1, start: 0.3}}",
    )
    assert load_config(top, ["algorithm.clip.type=none"]).algorithm.clip == NoClip(type="none")
    kept = load_config(top, ["algorithm.clip.high=0.4"]).algorithm.clip
    assert kept == TightToLooseClip(type="tight_to_loose", low=0.1, high=0.4, start=0.3)


def test_the_default_variant_needs_no_type(run_yaml):
    clip = load_config(run_yaml, ["algorithm.clip.low=0.1"]).algorithm.clip
    assert clip == ConstantClip(low=0.1)


def test_the_order_of_overrides_within_a_section_is_free(run_yaml):
    overrides = ["algorithm.clip.start=0.3", "algorithm.clip.type=tight_to_loose"]
    expected = TightToLooseClip(type="tight_to_loose", start=0.3)
    assert load_config(run_yaml, overrides).algorithm.clip == expected
    assert load_config(run_yaml, overrides[::-1]).algorithm.clip == expected


def test_of_two_equal_overrides_the_last_wins(run_yaml):
    assert load_config(run_yaml, ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=1", ".lr=1"])
def test_an_override_without_name_or_value_is_refused(run_yaml, override):
    with pytest.raises(ConfigError, match=r"must be `section\.setting=value`"):
        load_config(run_yaml, [override])


def test_an_override_that_is_not_yaml_says_which(run_yaml):
    with pytest.raises(ConfigError, match=r"override 'optim\.lr=\[1':1:3"):
        load_config(run_yaml, ["optim.lr=[1"])


plain = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None
)
@given(
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(0, 999_999),
    shuffle=st.booleans(),
    system_prompt=st.none() | plain,
    options=st.dictionaries(
        st.sampled_from(
            ["init_method_std", "fp32_residual_connection", "memory_efficient_layer_norm"]
        ),
        st.booleans() | st.floats(-1, 1) | plain,
    ),
)
def test_any_override_survives_saving_and_loading(
    run_yaml, lr, seed, shuffle, system_prompt, options
):
    def text(value: object) -> str:
        return yaml.safe_dump(value, default_style='"' if isinstance(value, str) else None)

    overrides = [f"optim.lr={lr!r}", f"run.seed={seed}", f"data.shuffle={str(shuffle).lower()}"]
    overrides += [f"data.system_prompt={text(system_prompt)}"]
    overrides += [f"model.megatron.{name}={text(value)}" for name, value in options.items()]
    config = load_config(run_yaml, overrides)
    assert (config.optim.lr, config.run.seed, config.data.shuffle) == (lr, seed, shuffle)
    assert config.data.system_prompt == system_prompt
    assert config.model.megatron == options

    saved = run_yaml.parent / "saved.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    assert load_config(saved, ["run.seed=1"]).run.seed == 1


def test_every_mistake_is_reported_at_once(run_yaml):
    problems = problems_of(
        run_yaml,
        "algorithm.drift.coef=-1",
        "optim.learning_rate=1",
        "optim.lrr=1",
        "rewards.functions=[{type: math, weigth: 2}, {type: python}]",
        "parallel.tp=3",  # valid by itself; the model has 8 heads
    )
    assert "algorithm.drift.coef: must be >= 0, got -1" in problems
    assert "optim.lrr: unknown setting; did you mean 'lr'?" in problems
    assert any(
        p.startswith("optim.learning_rate: unknown setting; known here: b") for p in problems
    )
    assert "rewards.functions.0.weigth: unknown setting; did you mean 'weight'?" in problems
    assert "rewards.functions.1.path: required, but missing" in problems
    assert len(problems) == 5  # a required setting is missing: no rules between settings


def test_rules_between_settings_are_checked_beside_invalid_settings(run_yaml):
    problems = problems_of(run_yaml, "algorithm.drift.coef=-1", "parallel.tp=3")
    assert problems[0] == "algorithm.drift.coef: must be >= 0, got -1"
    assert "does not divide num_attention_heads=8" in problems[1]
    assert len(problems) == 3  # the third: num_key_value_heads


def test_nothing_is_concluded_from_the_default_of_an_invalid_setting(run_yaml):
    # With coef at its default, "clip and drift do nothing" would name a drift nobody asked for.
    overrides = ["algorithm.mini_batches=1", "algorithm.clip={type: none}"]
    assert len(problems_of(run_yaml, *overrides)) == 1
    assert problems_of(run_yaml, *overrides, "algorithm.drift.coef=-1") == [
        "algorithm.drift.coef: must be >= 0, got -1"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "optim.lr: must be a number, got 'fast'"),
        ("optim.lr=.inf", "optim.lr: must be a finite number, got inf"),
        ("run.steps=1.5", "run.steps: must be an integer, got 1.5"),
        ("run.steps=", "run.steps: must be an integer, got null"),
        ("data.shuffle=maybe", "data.shuffle: must be true or false, got 'maybe'"),
        ("data.prompt_key=3", "data.prompt_key: must be a string (quote it), got 3"),
        ("optim=", "optim: must be a mapping of settings, got null"),
        (
            "optim.schedule=cosin",
            "optim.schedule: must be 'constant', 'linear' or 'cosine', got 'cosin'; did you mean "
            "'cosine'?",
        ),
        ("run.steps=true", "run.steps: must be an integer, got true"),
        ("rollout.piece_tokens=true", "rollout.piece_tokens: must be an integer, got true"),
        ("run.dir=''", "run.dir: must be a path, got ''"),
        (
            "run.dir=~/runs/a",
            "run.dir: ~ and $NAME are not replaced here, got '~/runs/a'; write the path itself",
        ),
        (
            "eval.sets={a: {path: $DATA/a.jsonl}}",
            "eval.sets.a.path: ~ and $NAME are not replaced here, got '$DATA/a.jsonl'; write the "
            "path itself",
        ),
        ("rewards.functions=[]", "rewards.functions: must be a list with at least 1 item, got []"),
        (
            "algorithm.clip.type=soft",
            "algorithm.clip.type: must be one of 'constant', 'tight_to_loose', "
            "'balanced', 'none', got 'soft'",
        ),
        (
            "rewards.functions=[{weight: 1}]",
            "rewards.functions.0.type: required, but missing; use one of "
            "'math', 'exact_match', 'format', 'python'",
        ),
        ("algorithm.clip.low=2", "algorithm.clip.low: must be < 1, got 2"),
        ("eval.sets={a: {}}", "eval.sets.a.path: required, but missing"),
        ("optm.lr=1", "optm: unknown setting; did you mean 'optim'?"),
        (
            "precision.rollout=fp8",
            "precision.rollout: must be 'bf16', 'fp32' or 'fp8_block', got 'fp8'",
        ),
    ],
)
def test_a_message_says_where_what_was_expected_and_what_came(run_yaml, override, message):
    assert message in problems_of(run_yaml, override)


def test_an_empty_file_lists_the_settings_it_lacks(tmp_path):
    problems = problems_of(write(tmp_path / "empty.yaml", "# nothing yet\n"))
    assert "run: required, but missing; set run.dir, run.steps" in problems
    assert len(problems) == 4


def test_read_config_does_not_look_at_the_machine(run_yaml):
    config = read_config(run_yaml, ["model.path=/nowhere", "parallel.tp=3"])
    assert config.parallel.tp == 3
    with pytest.raises(ConfigError, match=r"run\.steps"):
        read_config(run_yaml, ["run.steps=0"])


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(base, over) == {"a": {"b": 1, "c": 2}}
    assert (base, over) == ({"a": {"b": 1}}, {"a": {"c": 2}})


def test_an_override_of_the_type_drops_what_the_file_says_about_the_default_variant(run_yaml):
    top = write(run_yaml.parent / "top.yaml", "defaults: [run.yaml]\nalgorithm: {clip: {low: 0.1}}")
    assert load_config(top, ["algorithm.clip={type: none}"]).algorithm.clip == NoClip(type="none")
