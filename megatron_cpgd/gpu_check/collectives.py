"""All-reduce and send between the GPUs of this host, one process on each."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from megatron_cpgd.gpu_check.checks import Check, Emit, Setup
from megatron_cpgd.gpu_check.measure import fastest


def run(setup: Setup, emit: Emit) -> None:
    """Needs two GPUs; the rehearsal has two processes."""
    ranks = 2 if setup.device == "cpu" else torch.cuda.device_count()
    if ranks < 2:
        emit(Check(name="collectives", status="SKIP", reason=f"needs two GPUs, there is {ranks}"))
        return
    nbytes = setup.pick(rehearsal=1 << 16, quick=1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/rates"
        start_processes(_rank, (ranks, setup.device, nbytes, folder, out), nprocs=ranks)
        rates = torch.load(out)
    for name, rate in rates.items():
        where = f"{name}, {ranks} ranks, {nbytes >> 10} KiB"
        emit(Check(name=where, status="PASS", figures={"GB/s": rate}))


def _rank(rank: int, ranks: int, device: str, nbytes: int, folder: str, out: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    data = torch.ones(nbytes // 2, dtype=torch.bfloat16, device=device)
    ring = (ranks - 1) / ranks * nbytes  # what a rank sends, as NCCL's own tests count
    rates = {
        "all-reduce": 2 * ring / fastest(lambda: dist.all_reduce(data), device),
        "all-gather": ring / fastest(lambda: _gather(data), device),
    }
    if rank < 2:
        rates["send"] = nbytes / fastest(lambda: _send(data, rank), device)
    if rank == 0:
        torch.save({name: rate / 1e9 for name, rate in rates.items()}, Path(out))
    dist.barrier()
    dist.destroy_process_group()


def _gather(data: torch.Tensor) -> None:
    size = data.numel() // dist.get_world_size()
    part = data[size * dist.get_rank() :][:size].clone()
    dist.all_gather_into_tensor(data[: size * dist.get_world_size()], part)


def _send(data: torch.Tensor, rank: int) -> None:
    if rank == 0:
        dist.send(data, 1)
        dist.recv(data[:1], 1)  # rank 0 keeps the time: until the other one has it
    else:
        dist.recv(data, 0)
        dist.send(data[:1], 0)
