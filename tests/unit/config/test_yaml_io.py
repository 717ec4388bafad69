import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpgd.config.yaml_io import format_yaml, parse_yaml, read_yaml
from megatron_cpgd.errors import ConfigError

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=12)
)
# Words that one YAML version or the other reads as something else than a string.
NUMBERS = (
    "1e-6",
    "010",
    "0o17",
    "0x1F",
    "1_000",
    ".5",
    "1.",
    "+1",
    "nan",
    ".inf",
    "1:30",
    "2024-01-01",
)
WORDS = ("yes", "off", "true", "null", "~", "<<", "=", "-", "- x", "a: b", "# no", "", "a\n\nb ")
MARKS = ("é\n", "\r", "\x85", "\u2028x", "\u2029", "\ufeff", "\t", "\x07", "\U0001f600")
traps = st.sampled_from(NUMBERS + WORDS + MARKS)
values = st.recursive(
    scalars | traps,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(values)
def test_what_is_written_reads_back_equal_and_of_the_same_type(value):
    read = parse_yaml(format_yaml(value), "test")
    assert read == value
    assert repr(read) == repr(value)  # 1 == 1.0 == True would pass the line above


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_in_python_notation_is_a_float(number):
    assert parse_yaml(repr(number), "test") == number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        (".inf", math.inf),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_key_given_twice_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("optim:\n  lr: 1\n  eps: 2\n  lr: 3\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml:4:3: the key 'lr' is given twice"):
        read_yaml(path)


def test_a_syntax_error_names_file_line_and_column(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("run: {dir: x\noptim: 3\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml:2:6: "):
        read_yaml(path)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.getcwd []", "a: !!set {x}\n--- \nb: 1"])
def test_tags_and_second_documents_are_refused(text):
    with pytest.raises(ConfigError, match="test:"):
        parse_yaml(text, "test")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such file"):
        read_yaml(tmp_path / "missing.yaml")
    (tmp_path / "latin1.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        read_yaml(tmp_path / "latin1.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "control.yaml").write_bytes(b"a: \x01")
    with pytest.raises(ConfigError, match=r"control\.yaml: unacceptable character"):
        read_yaml(tmp_path / "control.yaml")
