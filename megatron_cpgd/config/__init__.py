"""Settings of a run: what exists (schema), how they are read (load) and what fits (checks)."""
