"""Memory and time of a run, predicted before it starts: no process group, no Megatron, no GPU."""
