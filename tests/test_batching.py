"""Few shapes, nothing lost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gcpo_jax.batching import bucket, chunks, count_bucket, pad_rows


@given(st.integers(1, 40_000))
def test_buckets_hold_and_waste_at_most_an_eighth(length):
    size = bucket(length)
    assert length <= size < length + max(16, length / 8 + 1)
    assert bucket(size) == size


@given(st.lists(st.integers(1, 300), min_size=1, max_size=50), st.integers(1, 16))
def test_chunks_cover_every_row_once_and_waste_at_most_a_half(lengths, rows):
    parts = list(chunks(lengths, rows))
    assert sorted(r for part, _ in parts for r in part) == list(range(len(lengths)))
    assert all(len(part) <= size <= min(rows, 1.5 * len(part)) for part, size in parts)


def test_counts_are_padded_to_few_sizes():
    assert sorted({count_bucket(k) for k in range(1, 65)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


def test_rows_are_right_padded():
    tokens, lengths = pad_rows([[5, 6], [7]], 3, 4)
    np.testing.assert_array_equal(tokens, [[5, 6, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [2, 1, 0])
