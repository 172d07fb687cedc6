"""What every family of models offers, tried on tiny ones."""
