"""Does counterfactual attention read the prior? Pictures with planted priors, and a model that learns them."""
