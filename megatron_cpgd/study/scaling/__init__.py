"""How a run scales: layouts over numbers of GPUs, measured or simulated; see tools/."""
