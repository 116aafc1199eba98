"""Finding and comparing final answers; tasks/math.py is the front. Imports neither JAX nor the rest of the package."""
