"""`python -m megatron_cpgd.cli` is `megatron-cpgd`."""

import sys

from megatron_cpgd.cli import main

sys.exit(main())
