"""Stable RL post-training of large language models on Megatron-Core, with vLLM as the sampler."""
