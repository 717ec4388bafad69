"""The engines of a run."""

from pathlib import Path

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.rollout.engine import RolloutEngine
from megatron_cpgd.rollout.engine_group import EngineGroup
from megatron_cpgd.rollout.vllm_engine import VllmEngine, check_devices


def start_engine(config: ExperimentConfig, log_path: Path) -> RolloutEngine:
    """Start vLLM on model.path; it loads in its own process while this one goes on.

    Args:
        log_path: of the first engine; another one's has its number in the name.

    Raises:
        ConfigError: `rollout.devices` does not fit the machine.
    """
    rollout = config.rollout
    check_devices(rollout.devices, rollout.engines)
    share = len(rollout.devices or []) // rollout.engines
    engines = [
        VllmEngine(
            config.model.path,
            dtype=config.precision.engine_weights,
            max_model_len=config.data.max_prompt_tokens + rollout.max_response_tokens,
            engine_args=rollout.engine_args,
            start_timeout_s=rollout.start_timeout_s,
            step_timeout_s=rollout.step_timeout_s,
            log_path=log_path.with_stem(f"{log_path.stem}_{i}") if i else log_path,
            seed=config.run.seed,
            trust_remote_code=config.model.trust_remote_code,
            return_routes=config.needs_rollout_routes,
            sleeps=rollout.sleep,
            devices=rollout.devices[i * share : (i + 1) * share] if rollout.devices else None,
        )
        for i in range(rollout.engines)
    ]
    return engines[0] if len(engines) == 1 else EngineGroup(engines)
