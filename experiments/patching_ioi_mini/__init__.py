"""Which parts of ioi-mini cause its answer: the main job, with its results committed."""
