from pathlib import Path

from megatron_cpgd.config.algorithm import DriftConfig
from megatron_cpgd.config.reference import format_reference, iter_settings, resolve

DOCS = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_every_setting_has_a_meaning_and_a_default():
    settings = list(iter_settings())
    assert len(settings) > 70
    for setting in settings:
        assert setting.meaning, setting.path
        assert setting.default or setting.path.endswith(".type"), setting.path
        assert "Undefined" not in setting.default, setting.path


def test_a_setting_shows_its_bounds_and_default():
    (row,) = [s for s in iter_settings() if s.path == "rollout.top_p"]
    assert (row.type, row.default) == ("number > 0, <= 1", "1")
    (row,) = [s for s in iter_settings() if s.path == "eval.sets.<name>.path"]
    assert (row.type, row.default) == ("path", "required")
    (row,) = [s for s in iter_settings() if s.path == "algorithm.clip.start"]
    assert row.meaning.startswith("(tight_to_loose) ")


def test_union_tags_are_not_part_of_a_path():
    path, annotation = resolve(("rewards", "functions", 0, "math", "weight"))
    assert path == ("rewards", "functions", 0, "weight")
    assert annotation is float
    assert resolve(("algorithm", "drift"))[1] is DriftConfig
    assert resolve(("algorithm", "drft", "x")) == (("algorithm", "drft", "x"), None)


def test_the_docs_hold_the_current_reference():
    assert format_reference() in DOCS.read_text(), (
        "docs/configuration.md is out of date: paste the output of `megatron-cpgd config --schema`"
    )
