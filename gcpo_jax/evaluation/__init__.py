"""Benchmarks answered, graded and counted; the command is gcpo_jax/evaluate.py, training's own measure held_out.py."""
