"""What is done at a site: pure functions ``f(x, *reads, ctx)``, a file for each kind, and the table of them all."""
