"""Ways of running worlds on a model. Each only places the visits of programs."""
