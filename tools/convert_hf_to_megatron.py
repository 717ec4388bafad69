"""Hugging Face folder to Megatron checkpoint: `megatron-cpgd convert hf-to-megatron`."""

import sys

from megatron_cpgd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
