"""Has a run collapsed, and why: rules over the metrics of its steps. No torch here."""
