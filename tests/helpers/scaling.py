"""A scaling study of a public model whose weights are not here: it can be planned, not run."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from megatron_cpgd.study.scaling.cells import Cell, ScalingStudy, load_study
from megatron_cpgd.study.scaling.runs import CellRun
from tests.helpers.full_run import ROOT
from tests.helpers.valid_run import write_run


def write_scaling_study(folder: Path, **changes: Any) -> Path:
    """Qwen3-8B on 1, 2 and 4 nodes of 8 H100; sections given replace those of it."""
    base = write_run(folder)
    published = ROOT / "configs/models/Qwen3-8B/config.json"
    shutil.copy(published, folder / "model" / "config.json")
    content = {
        "name": "small",
        "title": "A small study",
        "models": {"m": {"base": str(base)}},
        "settings": {
            "rollout.max_response_tokens": 2048,
            "rollout.engine_args.gpu_memory_utilization": 0.4,
            "model.recompute": "full",
        },
        "machine": "h100",
        "nodes": [1, 2, 4],
        "layouts": [{"tp": 4}],
        "batch": {"strong": [64]},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def load_scaling_study(folder: Path, **changes: Any) -> ScalingStudy:
    return load_study(write_scaling_study(folder, **changes), folder / "out", to_run=True)


def make_up_run(cell: Cell, step_s: float, *, steps: int = 8, warmup_steps: int = 2) -> None:
    """The folder of a finished run whose steps take so long, a tenth of it for responses; the
    warm-up takes ten times as long."""
    run = CellRun(cell)
    run.prepare()
    run.run.dir.mkdir()
    rows = []
    for step in range(1, steps + 1):
        seconds = step_s * (10 if step <= warmup_steps else 1)
        rows.append(
            {
                "step": step,
                "time/generate_s": 0.1 * seconds,
                "time/old_logprobs_s": 0.2 * seconds,
                "time/train_s": 0.5 * seconds,
                "time/sync_s": 0.125 * seconds,
                "time/score_s": 0.025 * seconds,
                "time/other_s": 0.05 * seconds,
                "time/eval_s": 1e6,  # in no part
                "rollout/response_tokens_mean": 1000.0,
                "rollout/response_tokens_max": 2000.0,
                # 8 responses to each prompt, of 512 tokens
                "perf/tokens_per_s": cell.prompts * 8 * 1512 / (0.5 * seconds),
                "perf/memory_peak_gib": 60.0,
            }
        )
    run.run.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    versions = dict.fromkeys(("python", "torch", "megatron_core", "vllm", "git_commit"), "1.0")
    run.run.versions.write_text(json.dumps(versions))
    shutil.copy(run.config, run.run.config)
    run.end(0)
