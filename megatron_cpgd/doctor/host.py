"""What the checks look at, and what they find."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.slurm import first_host, job_port


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Result of one check."""

    check: str
    status: Literal["PASS", "WARN", "FAIL"]
    found: str
    advice: str = ""
    """What to do, if it is not PASS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the checks look at."""

    config: ExperimentConfig | None
    environment: Mapping[str, str]

    @property
    def nodes(self) -> int:
        """Nodes that are examined together, as tasks of one step."""
        return int(self.environment.get("SLURM_STEP_NUM_NODES", "1"))

    @property
    def node(self) -> int:
        """Number of this one."""
        return int(self.environment.get("SLURM_NODEID", "0")) if self.nodes > 1 else 0

    @property
    def ranks(self) -> int:
        """Of the run, on this node."""
        if self.config is None:
            return 1
        return self.config.parallel.world_size // self.trainers if self.node < self.trainers else 0

    @property
    def trainers(self) -> int:
        """Nodes with ranks: the first ones. Engine nodes come behind them."""
        engine_nodes = self.config.rollout.nodes if self.config else 0
        return max(1, self.nodes - engine_nodes)

    @property
    def has_engines(self) -> bool:
        """Whether engines read the weights from this node's memory."""
        if self.nodes > 1 and self.config and self.config.rollout.nodes:
            return self.node >= self.trainers
        return self.node == 0

    @property
    def master(self) -> tuple[str, int]:
        """Where the ranks will meet."""
        first = first_host(self.environment.get("SLURM_STEP_NODELIST", socket.gethostname()))
        address = self.environment.get("MASTER_ADDR") or first
        port = self.environment.get("MASTER_PORT")
        return address, int(port) if port else job_port(self.environment)
