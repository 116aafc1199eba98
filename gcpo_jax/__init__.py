"""Group Causal Policy Optimization (arXiv 2508.05428) and its baselines, in pure JAX."""
