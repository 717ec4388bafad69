"""Check and measure what only a machine with NVIDIA GPUs can show, and write one record of it.

    python tools/gpu_check.py                      # everything, on all GPUs of this machine
    python tools/gpu_check.py --quick              # one GPU, less than 8 minutes
    python tools/gpu_check.py --only training engine
    python tools/gpu_check.py --cpu                # rehearse on the CPU with tiny sizes

Every section has a process and a time limit of its own: one that crashes or hangs is a FAIL and the
others go on. What a machine cannot do is a SKIP with its reason. record.md, record.json and the
logs of the sections go to --out. Exit code: 0, 1 if a check failed, 2 if there is no GPU.
"""

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from megatron_cpgd.errors import USER_ERROR
from megatron_cpgd.gpu_check.checks import Setup
from megatron_cpgd.gpu_check.record import make_record
from megatron_cpgd.gpu_check.runner import SECTIONS, run_sections

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Run the sections and write the record."""
    arguments = _parse(argv)
    if not arguments.cpu and not _has_gpu():
        sys.stderr.write(
            "gpu_check: torch sees no GPU on this machine; run it where there is one (see "
            "`megatron-cpgd doctor`), or rehearse with --cpu\n"
        )
        return USER_ERROR
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    names = arguments.only or list(SECTIONS)
    scale = "rehearsal" if arguments.cpu else "quick" if arguments.quick else "full"
    given = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        setup = Setup(scale=scale, scratch=scratch)
        sections = run_sections(names, setup, out, root=ROOT, show=_show)
    command = shlex.join(["python", "tools/gpu_check.py", *given])
    record = make_record(sections, command, root=ROOT)
    (out / "record.md").write_text(record.as_markdown())
    (out / "record.json").write_text(f"{json.dumps(asdict(record), indent=1)}\n")
    _show(f"{out / 'record.md'}: {dict(record.counts)}")
    return int(record.counts["FAIL"] > 0)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _show(line: str) -> None:
    print(line, flush=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="small sizes, less than 8 minutes")
    scale.add_argument("--cpu", action="store_true", help="rehearse on the CPU, tiny sizes")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        metavar="SECTION",
        help=f"some of: {', '.join(SECTIONS)}",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), metavar="FOLDER")
    parser.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="for random models, up to 20 GB"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
