import importlib.metadata
import json
from pathlib import Path

from megatron_cpgd.tracking.run_folder import RunFolder


def test_files_lie_where_the_documentation_says():
    folder = RunFolder(Path("RUN"))
    assert folder.config == Path("RUN/config.yaml")
    assert folder.metrics == Path("RUN/metrics.jsonl")
    assert folder.rollouts(12) == Path("RUN/rollouts/step_000012.jsonl")
    assert folder.checkpoint(120) == Path("RUN/checkpoints/step_000120")
    assert folder.hf(120) == Path("RUN/hf/step_000120")
    assert folder.log(3) == Path("RUN/logs/rank_3.log")


def test_checkpoints_are_listed_by_step_without_unfinished_ones(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.checkpoint_steps() == []
    for step in (1_000_000, 20, 3):
        folder.checkpoint(step).mkdir(parents=True)
    (folder.checkpoints / "step_000030.partial").mkdir()
    (folder.checkpoints / "latest").write_text("step_000020")
    assert folder.checkpoint_steps() == [3, 20, 1_000_000]


def test_versions_are_those_that_are_installed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_versions()
    versions = json.loads(folder.versions.read_text())
    assert versions["torch"] == f"torch {importlib.metadata.version('torch')}"
    assert versions["python"].startswith("3.12")
    for name in ("megatron_core", "vllm", "transformers", "transformer_engine", "apex"):
        assert versions[name], name
    assert all(isinstance(value, str) for value in versions.values())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["versions.json"]
