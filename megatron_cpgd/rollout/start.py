"""The engines of a run."""

from pathlib import Path

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rollout.engine import RolloutEngine
from megatron_cpgd.rollout.engine_group import EngineGroup
from megatron_cpgd.rollout.engine_nodes import EngineNodes
from megatron_cpgd.rollout.remote_engine import RemoteEngine, RemoteEngineGroup
from megatron_cpgd.rollout.vllm_engine import VllmEngine, check_devices
from megatron_cpgd.tracking.run_folder import RunFolder


def start_engine(config: ExperimentConfig, log_path: Path) -> RolloutEngine:
    """Start vLLM on model.path; it loads in its own process while this one goes on.

    Args:
        log_path: of the first engine; another one's has its number in the name.

    Raises:
        ConfigError: `rollout.devices` does not fit the machine, or the engines belong on other
            nodes.
    """
    rollout = config.rollout
    if rollout.nodes:
        raise ConfigError(
            f"rollout.nodes={rollout.nodes}: this command starts its engines on this machine; "
            "set rollout.nodes=0, and rollout.engines to what fits here"
        )
    check_devices(rollout.devices, rollout.engines)
    engines = [
        _start(config, log_path, i, _share(rollout.devices, i, rollout.engines))
        for i in range(rollout.engines)
    ]
    return engines[0] if len(engines) == 1 else EngineGroup(engines)


def start_engine_of_node(
    config: ExperimentConfig, log_path: Path, node: int, engine: int, gpus: int
) -> VllmEngine:
    """Start one of the engines of an engine node, which this process is on.

    Args:
        log_path: of the first engine of the run.
        engine: its number on the node.
        gpus: the node's number of CUDA devices; without `rollout.devices` the engines share them.

    Raises:
        ConfigError: the devices do not fit the node.
    """
    rollout, here = config.rollout, config.rollout.engines_per_node
    devices = rollout.devices
    if devices is None and gpus and here > 1:
        if gpus % here:
            raise ConfigError(
                f"rollout.engines={rollout.engines} on rollout.nodes={rollout.nodes}: {here} "
                f"engines cannot share the {gpus} GPUs of engine node {node} evenly; name those to "
                "use in rollout.devices"
            )
        devices = list(range(gpus))
    check_devices(devices, here)
    return _start(config, log_path, node * here + engine, _share(devices, engine, here))


def connect_engine_nodes(
    config: ExperimentConfig, folder: RunFolder, host: str
) -> RemoteEngineGroup:
    """The engines of the engine nodes, which connect by themselves while this process goes on.

    Args:
        host: where the nodes reach this process.
    """
    rollout = config.rollout
    nodes = EngineNodes(
        rollout.nodes,
        host=host,
        key_file=folder.engine_nodes_key,
        log_path=folder.engine_node_log,
    )
    engines = [
        RemoteEngine(
            nodes,
            node,
            engine,
            start_timeout_s=rollout.start_timeout_s,
            step_timeout_s=rollout.step_timeout_s,
        )
        for node in range(rollout.nodes)
        for engine in range(rollout.engines_per_node)
    ]
    return RemoteEngineGroup(engines, nodes)


def _share(devices: list[int] | None, engine: int, engines: int) -> list[int] | None:
    if devices is None:
        return None
    share = len(devices) // engines
    return devices[engine * share : (engine + 1) * share]


def _start(
    config: ExperimentConfig, log_path: Path, number: int, devices: list[int] | None
) -> VllmEngine:
    rollout = config.rollout
    return VllmEngine(
        config.model.path,
        dtype=config.precision.engine_weights,
        max_model_len=config.data.max_prompt_tokens + rollout.max_response_tokens,
        engine_args=rollout.engine_args,
        start_timeout_s=rollout.start_timeout_s,
        step_timeout_s=rollout.step_timeout_s,
        log_path=log_path.with_stem(f"{log_path.stem}_{number}") if number else log_path,
        seed=config.run.seed,
        trust_remote_code=config.model.trust_remote_code,
        return_routes=config.needs_rollout_routes,
        sleeps=rollout.sleep,
        devices=devices,
    )
