"""Studies of path interventions: the circuits of three models."""
