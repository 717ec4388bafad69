"""What a run leaves behind: logs, metrics, rollouts, versions and plots."""
