"""Training seen from inside: clamps held through it, and many conditions trained as one ensemble."""
