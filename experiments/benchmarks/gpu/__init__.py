"""Everything that is measured on a GPU, in one run: tests, sweeps, edges, forward passes, training."""
