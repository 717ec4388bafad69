"""What only a machine with GPUs can show, section by section; used by tools/gpu_check.py only."""
