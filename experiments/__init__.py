"""Studies and benchmarks: one folder each, run with one command; beside them, how to time, describe and tabulate."""
