"""The dry run."""


def describe(config) -> str:
    """Nothing yet."""
    return ""
