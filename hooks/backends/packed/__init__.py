"""The copy-on-write executor: worlds on one input, computed together where they differ from their base."""
