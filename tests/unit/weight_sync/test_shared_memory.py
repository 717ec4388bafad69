"""Arenas of processes that live stay, those of processes that have ended go."""

import os
import subprocess

from megatron_cpgd.weight_sync import shared_memory
from megatron_cpgd.weight_sync.shared_memory import arena_path, remove_stale_arenas


def test_only_arenas_of_ended_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    alive, stale = arena_path(os.getpid()), arena_path(ended.pid)
    foreign = tmp_path / f"other_{ended.pid}.safetensors"
    for path in (alive, stale, foreign):
        path.touch()
    remove_stale_arenas()
    assert sorted(tmp_path.iterdir()) == sorted([alive, foreign])
