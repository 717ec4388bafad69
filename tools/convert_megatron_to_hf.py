"""Megatron checkpoint to Hugging Face folder: `megatron-cpgd convert megatron-to-hf`."""

import sys

from megatron_cpgd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
