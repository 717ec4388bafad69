"""From a data file to prompts, and from scored sequences to micro-batches."""
