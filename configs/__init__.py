"""Recipes: one file each; get_config(variant) returns a gcpo_jax.config.Config."""
