"""Transformer Engine's Python code without its compiled library: modules can be built, not run."""

import enum
import importlib
import os
import sys
import types
from typing import Any

ENUMS = {
    "DType": [
        "kByte",
        "kInt32",
        "kFloat32",
        "kFloat16",
        "kBFloat16",
        "kFloat8E4M3",
        "kFloat8E5M2",
        "kFloat4E2M1",
    ],
    "FP8FwdTensors": [f"GEMM{i}_{x}" for i in (1, 2, 3) for x in ("INPUT", "WEIGHT", "OUTPUT")],
    "FP8BwdTensors": [f"GRAD_{x}{i}" for i in (1, 2, 3) for x in ("OUTPUT", "INPUT")],
}
"""Enumerations that are read while modules are imported or built; their values do not matter."""
BASES = ("CommOverlap", "CommOverlapP2P", "CommOverlapHelper")
"""Classes that Transformer Engine's own derive from."""


class _Absent:
    """Anything else of the library: it can be named, not used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")

    def __int__(self) -> int:  # of other enumerations
        return 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self._name} needs the compiled Transformer Engine")


class _Library(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


def install() -> None:
    """Import Transformer Engine with a library that is not there. Call it before megatron comes in.

    The process is good for looking at modules only: megatron-core takes the library for real.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # skips the search for libtransformer_engine.so
    library: Any = _Library("transformer_engine_torch")
    for name, members in ENUMS.items():
        setattr(library, name, enum.IntEnum(name, members, start=0))
    for name in BASES:
        setattr(library, name, type(name, (), {}))
    library.get_cudnn_version = lambda: 91900
    sys.modules[library.__name__] = library
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
