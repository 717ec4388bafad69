"""What a run counts, saves, removes and forgets on rank 0; the policy is a recorder."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_cpgd.batch_queue import BatchQueue
from megatron_cpgd.config.stability import StabilityConfig
from megatron_cpgd.guard import _last_good, _roll_back
from megatron_cpgd.in_flight import InFlight
from megatron_cpgd.policy.checkpoint import MANIFEST
from megatron_cpgd.run import note_skipped, publish, save
from megatron_cpgd.stability.detector import CollapseDetector
from megatron_cpgd.stop_request import StopRequest
from megatron_cpgd.tracking.run_folder import RunFolder
from tests.helpers.tiny import tiny_config


class Recorder:
    """In the place of the policy."""

    def __init__(self) -> None:
        self.saved: list[tuple[Path, dict[str, Any], dict[str, bytes]]] = []
        self.rolled_back: list[tuple[Path, float]] = []
        self.lr_scale = 1.0

    def save(self, path: Path, state: dict[str, Any], files: dict[str, bytes]) -> None:
        self.saved.append((path, state, files))

    def roll_back(self, path: Path, *, lr_factor: float) -> None:
        self.rolled_back.append((path, lr_factor))


@pytest.fixture
def run(tmp_path):
    """Behind step 8; responses are in flight, and a step was skipped."""
    in_flight = InFlight(piece_tokens=2, max_tokens=4)
    in_flight.begin([3], seed=0, size=1)
    batches = BatchQueue(SimpleNamespace(), staleness=2, last_step=20)
    batches._batches.append(SimpleNamespace(groups="waiting"))
    stability = StabilityConfig(action="roll_back", lr_factor=0.25)
    detector = CollapseDetector(stability)
    for step in (6, 7, 8):
        detector.observe(step, {"policy/skipped_in_a_row": float(step > 7)})
    return SimpleNamespace(
        config=tiny_config(tmp_path, checkpoint={"keep": 1}).model_copy(
            update={"stability": stability}
        ),
        folder=RunFolder(tmp_path), policy=Recorder(), stop=StopRequest(), detector=detector,
        prompts=SimpleNamespace(stream=SimpleNamespace(state=lambda: {"batches": 11})),
        sampler=SimpleNamespace(in_flight=in_flight), batches=batches, bad_steps=1, roll_backs=1,
    )  # fmt: skip


def write_checkpoint(folder: RunFolder, step: int, *, has_optimizer: bool = True) -> None:
    folder.checkpoint(step).mkdir(parents=True)
    manifest = {"has_optimizer": has_optimizer, "files": {}}
    (folder.checkpoint(step) / MANIFEST).write_text(json.dumps(manifest))


def test_skipped_optimizer_steps_are_counted_in_a_row(run):
    counts = []
    for reason in ("loss is nan", None, "loss is nan", "loss is inf"):
        note_skipped(run, reason, step=9)
        counts.append(run.bad_steps)
    assert counts == [2, 0, 1, 2]


def test_a_checkpoint_has_all_that_a_resumed_run_goes_on_with(run):
    run.batches.clear()
    save(run, 8)
    [(path, state, files)] = run.policy.saved
    assert path == run.folder.checkpoint(8)
    assert (state["step"], state["bad_steps"], state["roll_backs"]) == (8, 1, 1)
    assert state["prompts"] == {"batches": 11}
    assert state["detector"] == run.detector.state() and state["detector"]["held"]
    assert set(files) == {"in_flight.msgpack"}


# keep=1: the newest, and the newest from before step 8, where a condition began that still holds.
def test_with_a_new_checkpoint_the_run_gets_further_and_old_ones_go(run):
    for step in (2, 4, 6, 8, 9):
        write_checkpoint(run.folder, step)
    assert not run.stop.advanced
    publish(run, 9)
    assert run.stop.advanced
    assert run.folder.latest() == "step_000009"
    assert run.folder.checkpoint_steps() == [6, 9]


def test_the_checkpoint_to_go_back_to_is_from_before_the_first_sign_and_has_an_optimizer(run):
    for step in (2, 4, 6, 8):
        write_checkpoint(run.folder, step, has_optimizer=step != 4)
    onsets = [SimpleNamespace(onset=onset) for onset in (8, 6)]
    assert _last_good(run.folder, onsets) == 2
    assert _last_good(run.folder, onsets[:1]) == 6


def test_going_back_forgets_all_that_the_given_up_weights_have_left(run):
    _roll_back(run, 8, target=6)
    assert run.policy.rolled_back == [(run.folder.checkpoint(6), 0.25)]
    assert (run.roll_backs, run.bad_steps) == (2, 0)
    assert run.batches.waiting == () and run.sampler.in_flight.groups == []
    assert run.detector.state() == {"windows": {}, "extremes": {}, "held": {}}
