import os
import subprocess
import sys

PROGRAM = """
import logging, sys, warnings
from pathlib import Path
from megatron_cpgd.tracking.logging import setup_logging
setup_logging(int(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None)
setup_logging(int(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None)
logger = logging.getLogger("megatron_cpgd.area")
logger.debug("detail"); logger.info("saved"); logger.warning("careful")
logging.getLogger("library").warning("noise")
"""


def run(*arguments, stderr=subprocess.PIPE):
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    result = subprocess.run(command, stderr=stderr, text=True, check=True, env=os.environ)
    return [line.split(" ", 1)[1] for line in (result.stderr or "").splitlines()]


def test_rank_0_logs_to_the_terminal_and_to_its_file(tmp_path):
    expected = ["[rank 0] I megatron_cpgd.area: saved", "[rank 0] W megatron_cpgd.area: careful"]
    assert run(0, tmp_path / "logs" / "rank_0.log") == expected
    lines = (tmp_path / "logs" / "rank_0.log").read_text().splitlines()
    in_file = [line.split(" ", 1)[1] for line in lines]
    assert in_file == [*expected, "[rank 0] W library: noise"]


def test_other_ranks_show_only_warnings_on_the_terminal(tmp_path):
    assert run(3, tmp_path / "rank_3.log") == ["[rank 3] W megatron_cpgd.area: careful"]
    assert "[rank 3] I megatron_cpgd.area: saved" in (tmp_path / "rank_3.log").read_text()
    assert run(3) == ["[rank 3] W megatron_cpgd.area: careful"]


def test_a_rank_whose_stderr_is_its_log_writes_each_line_once(tmp_path):
    path = tmp_path / "rank_1.log"
    with path.open("a") as log:
        run(1, path, stderr=log)
    assert path.read_text().count("careful") == 1


def test_importing_the_package_leaves_the_root_logger_alone():
    code = "import logging, megatron_cpgd.tracking.logging; print(logging.getLogger().handlers)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
