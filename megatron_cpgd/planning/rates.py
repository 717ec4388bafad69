"""How fast a step was, beside its seconds: tokens, and FLOPs where the GPU's peak is known."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.planning.machine import GPUS, find_machine, save_machine
from megatron_cpgd.planning.model import read_model

DEVICES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""Name that the driver has for a GPU -> machine. Other forms of it, such as PCIe cards, have other
peaks."""


def note_machine(path: Path, name: str | None, device: str | None) -> None:
    """Write down what is assumed of the machine that a run is on, if it is known.

    Args:
        name: `tracking.machine`.
        device: the driver's name of the GPU; None on CPU.
    """
    name = name or ("cpu" if device is None else DEVICES.get(device))
    if name is not None:
        save_machine(find_machine(name), path)


class StepRates:
    """Of one run."""

    def __init__(self, hf: Mapping[str, Any], config: ExperimentConfig, device: str | None) -> None:
        """
        Args:
            hf: config.json of the model.
            device: the driver's name of the GPU; None on CPU.
        """
        self._model = read_model(hf)
        self._epochs = config.algorithm.epochs
        self._peak: float | None = None
        if device in DEVICES:
            flops = GPUS[DEVICES[device]].flops[config.precision.policy_weights]
            self._peak = flops * config.parallel.world_size

    def metrics(self, lengths: Sequence[int], seconds: Mapping[str, float]) -> dict[str, float]:
        """
        Args:
            lengths: tokens of each sequence that was trained on, prompt and response.
            seconds: the metrics `time/...` of the step.
        """
        train_s = seconds.get("time/train_s", 0.0)
        if not lengths or not train_s:
            return {}
        metrics = {"perf/tokens_per_s": self._epochs * sum(lengths) / train_s}
        if self._peak is not None:
            flops = self._epochs * sum(self._model.train_flops(n, n) for n in lengths)
            metrics["perf/mfu"] = flops / train_s / self._peak
        return metrics
