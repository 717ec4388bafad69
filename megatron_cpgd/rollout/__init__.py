"""The sampling engine: vLLM in a process of its own. The only package that imports vllm."""
