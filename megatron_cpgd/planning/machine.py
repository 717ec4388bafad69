"""Machines a run may be planned for: data sheets, and how much of them a run reaches.

Data sheets: NVIDIA "A100 Tensor Core GPU" (2021), "H100 Tensor Core GPU" (2023), "H200 Tensor Core
GPU" (2024) and "DGX B200" (2024); all rates are without sparsity and per direction. Memory is what
the driver reports of it. Network and host memory (32 modules of 64 GB) are those of a DGX of the
same generation.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_cpgd.config.messages import did_you_mean
from megatron_cpgd.config.yaml_io import format_yaml, read_yaml
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.files import write_text_atomic

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What is assumed beside the data sheet; `plan --calibrate` fits the three factors.

    The shares are typical of bf16 runs on Hopper; of none of ours, which has not seen a GPU.
    """

    dense: float = 0.45
    """Share of the peak that dense matrix products and attention reach, without waiting."""
    experts: float = 0.25
    """The same of the grouped products of experts, which are small and uneven."""
    fp8: float = 0.75
    """Share of the FP8 peak over the bf16 one that products in FP8 gain, their casts included: on
    Hopper 1.5 of 2."""
    bandwidth: float = 0.6
    """Share of the memory bandwidth that decoding and elementwise steps reach."""
    moves: float = 4.0
    """How often elementwise steps read or write each byte that autograd saves, forward and
    backward."""
    link: float = 0.7
    """Share of a link's rate that collectives reach."""
    hop_s: float = 15e-6
    """Latency of one collective inside a node."""
    network_hop_s: float = 60e-6
    """Latency of one collective between nodes."""
    layer_s: float = 4e-4
    """Launching the kernels of one layer, forward and backward, of one micro-batch."""
    iteration_s: float = 6e-3
    """The engine's own work for one decoding iteration."""
    sequence_s: float = 10e-6
    """The engine's own work for one token of one sequence."""
    host_write: float = 10e9
    """Bytes per second that one process writes into the arena; assumed of all ranks of a host."""
    host_writes: float = 80e9
    """The same of all receivers of an engine node, which share the memory of their host. On its way
    a byte from a GPU passes it three times: 240 of the 614 GB/s of 16 channels of DDR5-4800."""
    host_sum: float = 100e9
    """Bytes per second that all cores of a host sum up in the arena: 100 of them that each reach 1
    of the 3 to 8 GB/s which one core was seen to."""
    train_factor: float = 1.0
    """Measured / predicted time of the trainer's passes."""
    generate_factor: float = 1.0
    """The same of sampling."""
    sync_factor: float = 1.0
    """The same of the weight sync."""
    other_s: float = 0.0
    """Seconds of a step that are in no formula: rewards, bookkeeping."""
    rank_memory: int = 3 * GIB
    """Of each rank, in no formula: context, communicators, workspaces of libraries."""
    sleeping_engine: int = 2 * GIB
    """Of an engine that sleeps, on each of its GPUs: context, communicators, CUDA graphs."""
    receiver_memory: int = GIB
    """Of a process that receives weights, on its GPU of an engine node, beside its buckets: context
    and communicators. Assumed."""
    fragmentation: float = 0.05
    """Share of activations that the allocator loses."""
    usable: float = 0.95
    """Share of the memory that a plan may fill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One kind of node. On a CPU machine a "GPU" is one process."""

    name: str
    gpus_per_node: int
    memory: int
    """Bytes of one GPU; on CPU those of the host, which all processes share."""
    bandwidth: float
    """Bytes per second of a GPU's memory."""
    flops: dict[str, float]
    """Peak of dense matrix products per second, by number format: fp8 with factors of any kind,
    mxfp8 with one for 32 numbers."""
    nvlink: float
    """Bytes per second between the GPUs of a node."""
    network: float
    """Bytes per second and GPU between nodes."""
    pcie: float
    """Bytes per second between a GPU and its host."""
    host_memory: int
    """Bytes of one node."""
    accelerator: bool = True
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def receivers(self) -> int:
        """Processes of an engine node that take weights, as weight_sync/node_arena.py has it."""
        return self.gpus_per_node if self.accelerator else max(1, min(4, self.gpus_per_node // 4))

    @property
    def usable_memory(self) -> int:
        """Bytes of `memory` that a plan may fill."""
        return int(self.efficiency.usable * self.memory)

    def product_rate(self, precision: str, fp8: str | None = None) -> float:
        """FLOPs per second of ideal products: in this format of FP8 if the machine has it, else in
        `precision`."""
        if fp8 not in self.flops:
            return self.flops[precision]
        return self.efficiency.fp8 * self.flops[fp8]

    def link(self, ranks: int) -> tuple[float, float]:
        """Bytes per second and latency of a collective over so many neighbouring ranks."""
        inside = ranks <= self.gpus_per_node
        rate = self.nvlink if inside else self.network
        hop = self.efficiency.hop_s if inside else self.efficiency.network_hop_s
        return rate * self.efficiency.link, hop

    def transfer_s(self, payload: float, ranks: int) -> float:
        """Seconds in which each of so many ranks sends so many bytes."""
        if ranks == 1:
            return 0.0
        rate, hop = self.link(ranks)
        return payload / rate + hop


def _gpu(
    name: str, *, memory_mib: int, bandwidth: float, flops: dict[str, float], nvlink: float,
    network: float, pcie: float,
) -> Machine:  # fmt: skip
    return Machine(
        name=name, gpus_per_node=8, memory=memory_mib * 2**20, bandwidth=bandwidth, flops=flops,
        nvlink=nvlink, network=network, pcie=pcie, host_memory=32 * 64 * GIB,
    )  # fmt: skip


_DIVISORS = (
    "dense", "experts", "fp8", "bandwidth", "moves", "link", "host_write", "host_writes",
    "host_sum", "usable",
)  # fmt: skip
"""Fields of `Efficiency` that something is divided by."""

HOPPER = {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12}
GPUS = {
    machine.name: machine
    for machine in (
        _gpu(
            "a100", memory_mib=81_920, bandwidth=2.039e12, flops={"bf16": 312e12, "fp32": 19.5e12},
            nvlink=300e9, network=25e9, pcie=32e9,
        ),
        _gpu(
            "h100", memory_mib=81_559, bandwidth=3.35e12, flops=HOPPER,
            nvlink=450e9, network=50e9, pcie=64e9,
        ),
        _gpu(
            "h200", memory_mib=143_771, bandwidth=4.8e12, flops=HOPPER,
            nvlink=450e9, network=50e9, pcie=64e9,
        ),
        _gpu(
            "b200", memory_mib=183_359, bandwidth=8e12,
            flops={"bf16": 2250e12, "fp8": 4500e12, "mxfp8": 4500e12, "fp32": 75e12},
            nvlink=900e9, network=50e9, pcie=64e9,
        ),
    )
}  # fmt: skip
"""By the name that `--machine` takes."""


def cpu_machine() -> Machine:
    """This host: its cores and memory, and the rates of one slow core.

    The constants are rough means over the demo on a shared 2-core machine: calibrate.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        name="cpu", gpus_per_node=os.cpu_count() or 1, memory=host, bandwidth=8e9,
        flops={"fp32": 100e9, "bf16": 100e9}, nvlink=1e9, network=1e8, pcie=8e9, host_memory=host,
        accelerator=False,
        efficiency=Efficiency(
            dense=0.9, experts=0.6, bandwidth=0.5, link=0.5, hop_s=1e-3, layer_s=3e-3,
            iteration_s=1e-2, sequence_s=4e-5, host_write=4e8, host_writes=4e8, host_sum=4e9,
            rank_memory=110 << 20, fragmentation=0.05,
        ),
    )  # fmt: skip


def find_machine(name: str, where: str = "--machine") -> Machine:
    """A machine of the table, or the one that `save_machine` wrote to this file.

    Args:
        where: it was named, for the message.

    Raises:
        ConfigError: there is no such machine, or the file is not one.
    """
    if name in GPUS:
        return GPUS[name]
    if name == "cpu":
        return cpu_machine()
    if not Path(name).is_file():
        raise ConfigError(
            f"{where} {name}: neither one of {', '.join([*sorted(GPUS), 'cpu'])} nor a file"
        )
    given = read_yaml(Path(name))
    try:
        machine = TypeAdapter(Machine).validate_python(given)
        problems = list(_machine_problems(machine, given))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    if problems:
        raise ConfigError(
            f"{where} {name}: not a machine as `plan --calibrate` writes it: {'; '.join(problems)}"
        )
    return machine


def _machine_problems(machine: Machine, given: dict[str, Any]) -> Iterator[str]:
    """Names that were passed over, and numbers with which nothing can be computed."""
    known = asdict(machine)
    efficiency = known.pop("efficiency")
    for prefix, names, values in (
        ("", given.keys() - {"efficiency"}, known),
        ("efficiency.", given.get("efficiency", {}).keys(), efficiency),
        ("flops.", set(), machine.flops),
    ):
        for name in sorted(names - values.keys()):
            yield f"{prefix}{name}: unknown; {did_you_mean(name, values)}"
        for name, value in values.items():
            # Seconds and bytes that come on top may be none.
            may_be_0 = prefix == "efficiency." and name not in _DIVISORS
            if type(value) not in (int, float) or 0 < value < math.inf or (value == 0 and may_be_0):
                continue
            yield f"{prefix}{name}: must be {'>= 0' if may_be_0 else '> 0'}, got {value}"
    for precision in {"bf16", "fp32"} - machine.flops.keys():
        yield f"flops.{precision}: missing"


def save_machine(machine: Machine, path: Path) -> None:
    """Write a machine as YAML that `find_machine` reads back equal."""
    write_text_atomic(path, format_yaml(asdict(machine)))


def with_factors(machine: Machine, **values: Any) -> Machine:
    """The machine with some constants of its efficiency replaced."""
    return replace(machine, efficiency=replace(machine.efficiency, **values))
