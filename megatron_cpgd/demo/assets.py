"""The folder that `make demo` trains from: model, training problems, held-out problems."""

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_cpgd.demo.arithmetic import Problem, split_problems
from megatron_cpgd.demo.recipe import Recipe
from megatron_cpgd.errors import DataError
from megatron_cpgd.files import write_text_atomic

logger = logging.getLogger(__name__)

STAMP = "demo_assets.json"
"""Written last: the recipe's digest, and the digest of every other file."""


def make_assets(folder: Path, recipe: Recipe) -> bool:
    """Write model/, train.jsonl and heldout.jsonl; returns False if they were already there.

    A folder made from another recipe is replaced as a whole, once the new one is complete.

    Raises:
        DataError: `folder` holds something else, or cannot be made.
    """
    folder = folder.resolve()  # `.` has no name to derive the temporary one from
    if _is_complete(folder, recipe):
        logger.info("%s is up to date", folder)
        return False
    _refuse_foreign(folder)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error}; choose another folder") from error
    _write(unfinished, recipe)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)
    return True


def _is_complete(folder: Path, recipe: Recipe) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return bool(stamp == {"recipe": _digest_recipe(recipe), "files": _digest_files(folder)})
    except (OSError, ValueError):
        return False


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder / STAMP).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise DataError(
            f"{folder}: expected a new or empty folder, or one made by this tool (with a {STAMP}); "
            "it has other contents; choose another folder"
        )


def _write(folder: Path, recipe: Recipe) -> None:
    rng = random.Random(recipe.seed)
    problems = split_problems(
        rng, train=recipe.train, heldout=recipe.heldout, hard_share=recipe.hard_share
    )
    # Imported here: it takes torch and transformers, which a folder that is up to date needs not.
    from megatron_cpgd.demo.model import save_trained_model

    save_trained_model(folder / "model", problems, recipe, rng)
    _write_rows(folder / "train.jsonl", problems.train)
    _write_rows(folder / "heldout.jsonl", problems.heldout)
    stamp = {"recipe": _digest_recipe(recipe), "files": _digest_files(folder)}
    write_text_atomic(folder / STAMP, json.dumps(stamp, indent=2) + "\n")


def _write_rows(path: Path, problems: Sequence[Problem]) -> None:
    rows = [{"prompt": p.prompt, "answer": str(p.answer)} for p in problems]
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def _digest_recipe(recipe: Recipe) -> str:
    """Of the settings and of the code that they steer, so that an edit makes the folder stale."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _digest_files(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != STAMP)
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }
