"""The trained model on Megatron-Core; the only package that imports megatron.

Importing it makes megatron-core usable on this machine, see `device`.
"""

import logging
import warnings

from megatron_cpgd.policy import device, fp8, memory

# Upstream says at import which optional packages are absent; versions.json records them.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
fp8.set_environment()
device.install()
memory.tame_heap()
