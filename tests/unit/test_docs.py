"""The documentation names what exists: metrics, files, functions, links, configurations."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from megatron_cpgd.algorithm.advantages import compute_advantages
from megatron_cpgd.algorithm.correction import correction_metrics
from megatron_cpgd.algorithm.mismatch import compute_mismatch
from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.algorithm.reference_kl import reference_metrics
from megatron_cpgd.algorithm.sequences import one_rank_sequences
from megatron_cpgd.config.algorithm import AlgorithmConfig, NoCorrection, RejectionConfig
from megatron_cpgd.config.load import load_config
from megatron_cpgd.rewards.base import RewardResult
from megatron_cpgd.scored_batch import SampledResponses, ScoredBatch, batch_metrics
from megatron_cpgd.types import Prompt, Rollout, RolloutGroup
from tests.helpers.valid_run import write_run

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_cpgd"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METRIC = re.compile(
    r"(policy|rollout|routing|reward|reference|stability|weights|eval|perf|time)/[a-z0-9_<>/]+"
)
SHOWN_ONLY = {"policy/clip_frac"}
"""Made for the terminal from two others; in no row of metrics.jsonl."""


def metrics_in_code() -> set[str]:
    """Names of metrics in string literals; `<name>` stands for what an f-string fills in."""
    names = {
        text
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for text in _literals(node)
        if METRIC.fullmatch(text)
    }
    return names - SHOWN_ONLY


def _literals(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)) if not text.endswith(("/", "_")):  # f-strings
            yield text
        case ast.JoinedStr(values=[ast.Constant(value="reward/" | "eval/" as area), _, end]):
            yield f"{area}<name>{ast.literal_eval(end)}"
        case ast.Call(func=ast.Name(id="timer"), args=[ast.Constant(value=str(part))]):
            yield f"time/{part}_s"


def metrics_in_docs() -> list[str]:
    """First column of the tables in docs/output.md."""
    lines = (ROOT / "docs/output.md").read_text().splitlines()
    cells = [line.split("|")[1].strip(" `") for line in lines if line.startswith("|")]
    return [cell for cell in cells if METRIC.fullmatch(cell)]


def test_every_metric_is_described_once_and_no_other() -> None:
    assert sorted(metrics_in_docs()) == sorted(metrics_in_code())


def test_the_scan_finds_every_name_that_a_step_returns() -> None:
    one = torch.ones(1)
    tokens = dict.fromkeys(("old_logprobs", "advantages", "coefficients"), one)
    _, statistics = build_objective(AlgorithmConfig()).evaluate(
        one, one, tokens | {"loss_mask": one.bool()}, one_rank_sequences(0 * one.long())
    )
    correction = correction_metrics([one], NoCorrection(), RejectionConfig(veto=0.1))
    rollout = Rollout(token_ids=[5], logprobs=[0.0], finish_reason="stop", weight_version=0)
    prompt = Prompt(id="train:0", token_ids=[1], text="1+1=", answer="2")
    group = RolloutGroup(prompt=prompt, rollouts=[rollout, rollout])
    rewards = RewardResult(total=[0.0, 1.0], columns={"math": [0.0, 1.0]}, timeouts=0, errors=0)
    sampled = SampledResponses(group_size=2)
    sampled.add([group], rewards)
    batch = ScoredBatch(
        groups=[group],
        rewards=[[0.0, 1.0]],
        reward_parts={"math": [[0.0, 1.0]]},
        advantages=compute_advantages(
            torch.tensor([[0.0, 1.0]]), prompt_weight="equal", max_weight=3.0
        ),
        version=0,
        metrics=sampled.metrics([0]),
    )
    returned = {
        *statistics.finish(), *batch_metrics(batch, 1), *compute_mismatch(one, one), *correction,
        *reference_metrics(one, one),
    }  # fmt: skip
    assert returned - {"reward/math_mean"} <= metrics_in_code()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert not [link for link in local if not _leads_somewhere(path, link)]


def _leads_somewhere(path: Path, link: str) -> bool:
    file, _, anchor = link.partition("#")
    target = path.parent / file if file else path
    if not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
    # As GitHub makes anchors: lower case, no punctuation, dashes for spaces.
    return anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_path_and_function_in_backticks_exists(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    words = [word for span in re.findall(r"`([^`]+)`", text) for word in span.split()]
    assert not [word for word in words if _is_in_tree(word) and not _exists(word)]


def _is_in_tree(word: str) -> bool:
    """Whether a word of the documentation claims to be a file or folder of this repository."""
    file, _, _ = word.partition(":")
    folders = {each.name for base in (ROOT, PACKAGE) for each in base.iterdir() if each.is_dir()}
    is_folder = file.endswith("/") and file.split("/")[0] in folders - {"runs"}
    return bool(is_folder or re.fullmatch(r"[\w./-]+\.py", file) or "tests/" in file)


def _exists(word: str) -> bool:
    """A path below the repository or the package; behind a colon, a function or class in it."""
    file, _, name = word.partition(":")
    targets = [base / file for base in (ROOT, PACKAGE) if (base / file).exists()]
    if not targets or not name:
        return bool(targets)
    return bool(re.search(rf"^\s*(def|class) {name}\b", targets[0].read_text(), re.MULTILINE))


def yaml_blocks(name: str) -> list[str]:
    """The YAML blocks of a page."""
    text = (ROOT / "docs" / name).read_text()
    return re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", yaml_blocks("objective.md"))
def test_every_objective_in_the_docs_is_a_valid_configuration(block: str, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | yaml.safe_load(block)))
    load_config(file)


def test_the_block_of_defaults_spells_out_the_defaults() -> None:
    written = yaml.safe_load(yaml_blocks("objective.md")[0])["algorithm"]
    assert AlgorithmConfig.model_validate(written) == AlgorithmConfig()
