import pytest

from megatron_cpgd.config.load import read_config, save_config
from megatron_cpgd.config.resume import check_resume
from megatron_cpgd.errors import ConfigError


@pytest.fixture
def run_dir(run_yaml):
    config = read_config(run_yaml)
    config.run.dir.mkdir()
    save_config(config, config.run.dir / "config.yaml")
    return config.run.dir


def test_a_new_folder_can_be_used(run_yaml, tmp_path):
    assert check_resume(read_config(run_yaml), tmp_path / "new") == []


def test_the_same_run_can_be_resumed(run_yaml, run_dir):
    assert check_resume(read_config(run_yaml), run_dir) == []


@pytest.mark.parametrize(
    "override",
    [
        "run.steps=99",
        "run.dir=elsewhere",
        "tracking.rollouts_per_step=0",
        "checkpoint.every=1",
        "eval.sets.aime.path=x",
        "rewards.timeout_s=1",
        "rollout.nodes=1",
        "rollout.devices=[1]",
        "rollout.step_timeout_s=1",
        "rollout.sync=in_place",
        "rollout.sleep=true",
        "optim.offload=true",
    ],
)
def test_what_is_not_learnt_from_may_change(run_yaml, run_dir, override):
    assert check_resume(read_config(run_yaml, [override]), run_dir) == []


def test_every_differing_setting_is_listed(run_yaml, run_dir):
    overrides = ["optim.lr=2e-6", "algorithm.clip={type: none}", "model.megatron.x=1"]
    overrides += ["tracking.routing_every=3"]  # batches that wait would lack their routes
    lines = check_resume(read_config(run_yaml, overrides), run_dir)
    assert f"optim.lr: the run in {run_dir} has 1e-06, now 2e-06" in lines
    assert any(line.startswith("algorithm.clip.type: ") for line in lines)
    assert any(line.startswith("algorithm.clip.low: ") for line in lines)
    assert any(line.startswith("model.megatron.x: ") for line in lines)
    assert any(line.startswith("tracking.routing_every: ") for line in lines)
    assert "use another run.dir" in lines[-1]


def test_a_config_of_another_version_is_refused(run_yaml, run_dir):
    (run_dir / "config.yaml").write_text("old: 1\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: 5 problems"):
        check_resume(read_config(run_yaml), run_dir)
