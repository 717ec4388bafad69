"""Names of upstream's options, without importing it."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_cpgd.config.load import load_config
from megatron_cpgd.config.upstream import declared_names
from megatron_cpgd.errors import ConfigError

CLASSES = {
    ("vllm", "engine/arg_utils.py"): {"EngineArgs"},
    ("megatron", "core/model_parallel_config.py", "core/transformer/transformer_config.py"): {
        "ModelParallelConfig", "TransformerConfig", "MLATransformerConfig"
    },
}  # fmt: skip


@pytest.mark.parametrize("source", CLASSES)
def test_every_field_of_the_classes_is_known(source: tuple[str, ...]) -> None:
    package, *files = source
    found, known = set(), declared_names(*source)
    spec = find_spec(package)
    assert known is not None and spec is not None and spec.submodule_search_locations
    for file in files:
        tree = ast.parse(Path(spec.submodule_search_locations[0], file).read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name in CLASSES[source]:
                found.add(node.name)
                fields = {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
                assert len(fields) > 10 and fields <= known
    assert found == CLASSES[source]


def test_where_upstream_is_not_installed_no_name_is_refused() -> None:
    assert declared_names("no_such_package", "x.py") is None


def test_a_misspelt_option_is_found_by_the_first_check(run_yaml: Path) -> None:
    given = ["rollout.engine_args.tensor_paralel_size=2", "model.megatron.init_method_sdt=1"]
    with pytest.raises(ConfigError, match="did you mean 'init_method_std'") as caught:
        load_config(run_yaml, given)
    assert (
        "rollout.engine_args.tensor_paralel_size: vllm has no such option; did you mean "
        "'tensor_parallel_size'?"
    ) in str(caught.value)
