"""Compares settings over seeds: a grid of runs, its tables, plots and report; see tools/."""
