"""Accuracy of a Hugging Face folder on a run's evaluation sets, by vLLM or by transformers."""

import tempfile
from pathlib import Path
from typing import Literal

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.data.run_prompts import Prompts
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rollout.engine import RolloutEngine
from megatron_cpgd.rollout.start import start_engine
from megatron_cpgd.rollout.transformers_engine import TransformersEngine
from megatron_cpgd.sampler import Sampler
from megatron_cpgd.weight_sync.arena import quantized_checkpoint

Backend = Literal["vllm", "transformers"]


def evaluate_model(config: ExperimentConfig, model_dir: Path, backend: Backend) -> dict[str, float]:
    """Metrics `eval/<set>/...` of the model in `model_dir`, tokenizer included.

    Args:
        config: names the evaluation sets, the prompts' form and the rewards.

    Raises:
        ConfigError: the configuration has no evaluation set.
    """
    if not config.eval.sets:
        raise ConfigError("eval.sets: there is nothing to evaluate; name at least one set")
    model = config.model.model_copy(update={"path": model_dir, "tokenizer": None})
    # Nothing is trained, so nobody asks the engine for routes, which would cost it memory.
    algorithm = config.algorithm.model_copy(update={"routing_replay": "none"})
    tracking = config.tracking.model_copy(update={"routing_every": None})
    config = config.model_copy(
        update={"model": model, "algorithm": algorithm, "tracking": tracking}
    )
    prompts = Prompts(config)
    with tempfile.TemporaryDirectory() as folder:
        engine = _build_engine(config, backend, Path(folder) / "engine.log")
        try:
            sampler = Sampler(config, prompts, engine)
            try:
                return sampler.evaluate(version=0)
            finally:
                sampler.close()
        finally:
            engine.close()


def _build_engine(config: ExperimentConfig, backend: Backend, log_path: Path) -> RolloutEngine:
    dtype = config.precision.engine_weights
    if backend == "vllm":
        engine = start_engine(config, log_path)
        if dtype == "fp8_block":
            _load_quantized(engine, config.model.path)
        return engine
    if dtype == "fp8_block":
        raise ConfigError(
            "precision.rollout=fp8_block: transformers does not compute with FP8 weights here; "
            "set precision.rollout=bf16 or use --backend vllm"
        )
    return TransformersEngine(
        config.model.path, dtype=dtype, trust_remote_code=config.model.trust_remote_code
    )


def _load_quantized(engine: RolloutEngine, model_dir: Path) -> None:
    try:
        with quantized_checkpoint(model_dir) as weights:
            engine.refresh(weights.path, version=0)
    except BaseException:
        engine.close()
        raise
