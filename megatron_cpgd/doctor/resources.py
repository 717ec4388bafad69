"""Disks, shared memory, limits."""

import json
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_cpgd.doctor.host import Finding, Host

SHARED_MEMORY = Path("/dev/shm")
MIN_OPEN_FILES = 4096
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "bf16": 2, "fp32": 4, "fp8_block": 3}
_ADAM_BYTES = 8
"""Per parameter: two fp32 moments. bf16 weights have an fp32 copy besides."""


def check_space(host: Host) -> Iterator[Finding]:
    """Writable output, room for checkpoints, and shared memory for the weights."""
    if host.config is None:
        return
    config, folder = host.config, _existing_parent(host.config.run.dir)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = f"cannot write in {folder}: {error.strerror}"
        yield Finding(check="run.dir", status="FAIL", found=found, advice="choose another run.dir")
        return
    parameters = count_parameters(config.model.path)
    weights = _BYTES[config.precision.policy_weights]
    checkpoint = parameters * (weights + _ADAM_BYTES + (4 if weights == 2 else 0))
    export = parameters * weights
    free = shutil.disk_usage(folder).free
    found = (
        f"{_gb(free)} free in {folder}; a checkpoint takes about {_gb(checkpoint)}, an export "
        f"{_gb(export)}"
    )
    advice = "free some space, or lower checkpoint.keep"
    # While one is written, checkpoint.keep others exist.
    if free < checkpoint + export:
        yield Finding(check="run.dir", status="FAIL", found=found, advice=advice)
    elif free < (config.checkpoint.keep + 1) * checkpoint + export:
        yield Finding(check="run.dir", status="WARN", found=found, advice=advice)
    else:
        yield Finding(check="run.dir", status="PASS", found=found)
    if host.has_engines and config.rollout.sync == "arena":
        needed = parameters * _BYTES[config.precision.engine_weights]
        free = shutil.disk_usage(SHARED_MEMORY).free
        found = f"{_gb(free)} free in {SHARED_MEMORY}, the weights take about {_gb(needed)}"
        if free < needed:
            advice = f"mount -o remount,size=... {SHARED_MEMORY}; in docker --shm-size"
            yield Finding(check="shared_memory", status="FAIL", found=found, advice=advice)
        else:
            yield Finding(check="shared_memory", status="PASS", found=found)


def check_limits(_: Host) -> Iterator[Finding]:
    """Open files, and memory that InfiniBand may pin."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < MIN_OPEN_FILES:
        advice = f"ulimit -n {MIN_OPEN_FILES}, or more, where the job starts"
        yield Finding(check="open_files", status="WARN", found=f"limit {files}", advice=advice)
    else:
        yield Finding(check="open_files", status="PASS", found=f"limit {files}")
    pinned = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if pinned == resource.RLIM_INFINITY:
        yield Finding(check="locked_memory", status="PASS", found="unlimited")
    elif not Path("/sys/class/infiniband").exists():
        found = f"limit {_gb(pinned)}, and no InfiniBand that would need more"
        yield Finding(check="locked_memory", status="PASS", found=found)
    else:
        advice = "ulimit -l unlimited; for slurmd LimitMEMLOCK=infinity"
        found = f"limit {_gb(pinned)}: InfiniBand may fail to pin its buffers"
        yield Finding(check="locked_memory", status="WARN", found=found, advice=advice)


def count_parameters(model: Path) -> int:
    """About how many numbers the checkpoint holds, by the size of its files."""
    config = json.loads((model / "config.json").read_text())
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return sum(p.stat().st_size for p in model.glob("*.safetensors")) // _BYTES.get(dtype, 2)


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.exists())


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
