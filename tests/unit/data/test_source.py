import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_cpgd.data.source import read_rows
from megatron_cpgd.errors import DataError

ROWS = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+2?", "answer": "4"}]


def test_jsonl_rows_skip_blank_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "1+1?", "answer": "2"}\n\n{"prompt": "2+2?", "answer": "4"}\n')
    assert read_rows(path) == ROWS


def test_jsonl_strings_may_hold_other_line_separators(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a\u2028b\x85c"}\r\n', encoding="utf-8", newline="")
    assert read_rows(path) == [{"prompt": "a\u2028b\x85c"}]


def test_parquet_rows(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_rows(path) == ROWS


def test_saved_dataset_rows(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "data")
    assert read_rows(tmp_path / "data") == ROWS


def test_saved_splits_are_named_in_the_error(tmp_path):
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=r"splits \['test', 'train'\]"):
        read_rows(tmp_path / "data")


def test_bad_lines_are_listed_with_their_numbers(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n' + b"x\n" * 4)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert "7 of 8 lines are not JSON objects" in message
    assert f"{path}:2: Expecting value" in message
    assert f"{path}:3: expected an object, got list" in message
    assert f"{path}:4: 'utf-8' codec" in message
    assert f"{path}:6:" in message and f"{path}:7:" not in message
    assert message.endswith("and 2 more")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file or folder"),
        ("empty.jsonl", b"\n\n", "expected at least one row"),
        ("data.csv", b"a,b\n", r"suffix '\.csv'; expected one of \.jsonl, \.parquet"),
        ("data.parquet", b"PAR0", "not a readable Parquet file"),
        ("cut.parquet", b"", "not a readable Parquet file"),
    ],
)
def test_unusable_file_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_folder_without_a_dataset_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="not a folder written by"):
        read_rows(tmp_path)
