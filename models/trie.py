"""Prompts of which some begin alike, with every beginning computed once."""

from typing import Any, NamedTuple

import jax.numpy as jnp


class Trie(NamedTuple):
    """Which tokens of prompts[B, P] stand behind equal tokens and are equal: each such set, a node, is computed once.

    Every t prompts have a trie of their own, of U nodes. Attention is computed for all B P, the rest for the nodes.
    """

    node: Any  # [B, P] number of a token's node in its trie
    place: Any  # [B / t, U] in the t P tokens, where a node stands; padding is any place


def as_tokens(trie: Trie | None, x):
    """Nodes' values x[B / t, U, ...] as tokens' [B, P, ...]; x itself where every token is computed."""
    if trie is None:
        return x
    groups, (B, P) = x.shape[0], trie.node.shape
    return _take(x, trie.node.reshape(groups, -1)).reshape(B, P, *x.shape[2:])


def as_nodes(trie: Trie | None, x):
    """The inverse of as_tokens."""
    return x if trie is None else _take(x.reshape(trie.place.shape[0], -1, *x.shape[2:]), trie.place)


def _take(x, at):
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)
