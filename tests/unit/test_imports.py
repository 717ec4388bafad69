"""Imports inside the package point downwards only, see docs/architecture.md."""

import ast
from pathlib import Path

import megatron_cpgd

PACKAGE = Path(megatron_cpgd.__file__).parent
ROWS = (
    {"cli", "study", "gpu_check"},
    {"train", "evaluate", "serve"},
    {"guard", "preemption"},
    {"run"},
    {"batch_queue"},
    {"sampler", "weight_sync"},
    {"in_flight"},
    {"policy", "rollout", "demo"},
    {"scored_batch", "planning", "doctor"},
    {"algorithm", "data", "weights", "rewards", "tracking", "launch", "slurm"},
    {"stability"},
    {"config"},
    {"stop_request"},
    {"types", "errors", "files", "imports"},
)


def test_imports_point_downwards_only() -> None:
    row_of = {name: row for row, names in enumerate(ROWS) for name in names}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        importer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if importer == "__init__":
            continue
        for imported in _imports(path) - {importer}:
            if row_of[importer] >= row_of[imported]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not wrong


def _imports(path: Path) -> set[str]:
    """Names of the packages of this project that a file imports, inside functions too."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "megatron_cpgd":
            modules += [f"megatron_cpgd.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
    return {name.split(".")[1] for name in modules if name.startswith("megatron_cpgd.")}
