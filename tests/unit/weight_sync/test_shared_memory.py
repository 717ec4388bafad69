"""Arenas of other living processes stay; those of ended ones, and old ones of our number, go."""

import os
import subprocess

import pytest

from megatron_cpgd.weight_sync import shared_memory
from megatron_cpgd.weight_sync.shared_memory import arena_path, remove_stale_arenas


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    return tmp_path


@pytest.fixture
def ended():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_only_arenas_that_nobody_uses_are_removed(folder, ended):
    living, other = arena_path(os.getppid()), folder / f"other_{ended}.safetensors"
    gone = (arena_path(ended), arena_path(os.getpid()))
    for path in (living, other, *gone):
        path.touch()
    remove_stale_arenas()
    assert sorted(folder.iterdir()) == sorted([living, other])


def test_the_arena_of_another_user_is_left_alone(folder, ended, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError(path)

    arena_path(ended).touch()
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    remove_stale_arenas()
    assert arena_path(ended).exists()
