"""The trained model on Megatron-Core; the only package that imports megatron.

Importing it makes megatron-core usable on this machine, see `device`.
"""

from megatron_cpgd.policy import device

device.install()
