"""Recipes: one file each; get_config(variant) returns a gcpo_jax.config.Config, in eval_*.py an EvalConfig."""
