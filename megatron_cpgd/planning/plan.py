"""The records of a plan: memory and seconds of one run, and whether it fits."""

from dataclasses import dataclass
from typing import Literal

from megatron_cpgd.planning.generation import GenerationSeconds
from megatron_cpgd.planning.layout import Layout
from megatron_cpgd.planning.machine import Machine
from megatron_cpgd.planning.memory import EngineMemory, EngineSettings, HostMemory, RankMemory
from megatron_cpgd.planning.passes import PassSeconds
from megatron_cpgd.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Of one step; evaluations, checkpoints and exports come on top."""

    generate: float
    """What the trainer waits for sampling."""
    reload: float
    """With `optim.offload`: weights and optimizer state back to the GPU."""
    old_logprobs: float
    ref_logprobs: float
    train: float
    sync: float
    other: float

    @property
    def total(self) -> float:
        return (
            self.generate + self.reload + self.old_logprobs + self.ref_logprobs + self.train
            + self.sync + self.other
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Bytes of one GPU that trainer and engine fill at the same time."""

    phase: Literal["training", "sampling"]
    """Training stands for all that the trainer does, and for everything if no engine sleeps."""
    rank: RankMemory
    trainer: int
    engine: int

    @property
    def total(self) -> int:
        return self.trainer + self.engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The prediction."""

    layout: Layout
    machine: Machine
    workload: Workload
    nodes: int
    parameters: int
    active_parameters: int
    stages: tuple[RankMemory, ...]
    engine: EngineMemory
    hosts: tuple[HostMemory, ...]
    seconds: StepSeconds
    generation: GenerationSeconds
    unbounded: GenerationSeconds
    """The same if every sequence that an engine may take at a time had room in its KV cache."""
    training: PassSeconds
    problems: tuple[str, ...]
    """Why it does not fit; empty: it does."""
    tight: tuple[str, ...]
    """What fits only barely, and so decides what else fits or how fast it is."""
    warnings: tuple[str, ...]
    train_flops: float
    """Of the training passes of a step, nothing counted twice."""

    @property
    def worst(self) -> RankMemory:
        """The rank that needs most while it trains, beside what the engine has on its GPU."""
        return max(self.stages, key=lambda stage: stage.total + self.beside(stage.stage))

    @property
    def fullest(self) -> Share:
        """The GPU of a rank that is fullest, and when."""
        training = Share(
            phase="training", rank=self.worst, trainer=self.worst.total,
            engine=self.beside(self.worst.stage),
        )  # fmt: skip
        return max((training, self.sampling or training), key=lambda share: share.total)

    @property
    def host(self) -> HostMemory:
        """The fullest."""
        return max(self.hosts, key=lambda host: host.total)

    @property
    def sampling(self) -> Share | None:
        """The GPU that is fullest while engines sample that sleep otherwise; None: none does.

        A sync takes no more: they wake when the policy has left, and it writes while they sleep.
        """
        shares = [
            Share(
                phase="sampling", rank=rank, trainer=rank.idle, engine=count * self.engine.claimed
            )
            for rank in self.stages
            if self.workload.engine.sleeps and (count := self.engines_beside(rank.stage))
        ]
        return max(shares, key=lambda share: share.total, default=None)

    def beside(self, stage: int) -> int:
        """Bytes of the engine on the GPUs of a stage's ranks, while the trainer works."""
        asleep = self.workload.engine.sleeps
        claimed = self.machine.efficiency.sleeping_engine if asleep else self.engine.claimed
        return self.engines_beside(stage) * claimed

    def engines_beside(self, stage: int) -> int:
        """Engines on the GPU of a stage's rank that has most of them."""
        engine = self.workload.engine
        if not self.machine.accelerator:
            return 0
        per_stage = self.layout.world_size // self.layout.pp
        end = min((stage + 1) * per_stage, self.machine.gpus_per_node)
        return max((engine.on_gpu(gpu) for gpu in range(stage * per_stage, end)), default=0)

    @property
    def gpus(self) -> int:
        """Of trainer and engines."""
        return count_gpus(self.layout, self.workload.engine, self.machine)

    @property
    def tokens_per_gpu_s(self) -> float:
        """Tokens of a step over its seconds, and over all GPUs of trainer and engines."""
        return self.workload.tokens / self.seconds.total / self.gpus

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def mfu(self) -> float:
        """Model FLOPs of the training passes over what the GPUs could do in their time."""
        peak = self.machine.flops[self.workload.trainer.passes.precision]
        return self.train_flops / (self.seconds.train * peak * self.layout.world_size)


def count_gpus(layout: Layout, engine: EngineSettings, machine: Machine) -> int:
    """GPUs up to the last one that trainer or engines use; the latter are on the first host, unless
    they have nodes."""
    if engine.nodes:
        return layout.world_size + engine.engines * engine.tp
    last = max(engine.devices or (0,)) + 1
    return max(layout.world_size, min(last, machine.gpus_per_node))
