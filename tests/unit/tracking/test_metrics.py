import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpgd.errors import DataError
from megatron_cpgd.tracking.metrics import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path):
    """A log with the steps 0 to 4."""
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    for step in range(5):
        log.append(step, {"loss": step / 2, "weights/digest": f"d{step}"})
    log.close()
    return tmp_path / "run" / "metrics.jsonl"


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def test_rows_read_back_as_they_were_written(path):
    assert read_metrics(path)[3] == {"step": 3, "loss": 1.5, "weights/digest": "d3"}


def test_a_row_is_on_disk_as_soon_as_append_returns(path):
    log = MetricsLog(path, resumed_step=4)
    log.append(5, {"loss": 1})
    assert steps(path) == [0, 1, 2, 3, 4, 5]
    log.close()


def test_resuming_removes_the_rows_that_will_be_computed_anew(path):
    log = MetricsLog(path, resumed_step=2)
    log.append(3, {"loss": 9.0})
    log.close()
    assert steps(path) == [0, 1, 2, 3]
    assert read_metrics(path)[3]["loss"] == 9.0


def test_a_new_run_starts_an_empty_log(path):
    MetricsLog(path).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_is_ignored_and_removed_on_resume(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    # Without the line end alone (cut 1) the row is whole.
    whole = [0, 1, 2, 3] + ([4] if cut == 1 else [])
    assert steps(path) == whole
    log = MetricsLog(path, resumed_step=4)
    log.append(5, {"loss": 0.0})
    log.close()
    assert steps(path) == [*whole, 5]


def test_a_damaged_line_in_the_middle_is_named(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], '{"loss": 1}\n', *lines[2:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl:3: not a row of metrics"):
        read_metrics(path)
    before = path.read_bytes()
    with pytest.raises(DataError):
        MetricsLog(path, resumed_step=3)
    assert path.read_bytes() == before


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(st.text().filter(lambda name: name != "step"), st.floats() | st.integers()))
def test_any_number_survives_also_those_json_does_not_know(tmp_path_factory, metrics):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(7, metrics)
    log.close()
    (row,) = read_metrics(path)
    for name, value in metrics.items():
        assert row[name] == value or (math.isnan(value) and math.isnan(row[name]))


def test_the_file_is_json_for_other_readers_too(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(0, {"a": math.nan, "b": -math.inf})
    log.close()
    # NaN and Infinity as bare words would be refused by everything but Python.
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "a": "nan", "b": "-inf"}\n'
