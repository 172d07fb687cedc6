"""Studies and benchmarks: one folder each, run with one command, nothing shared but the library."""
