"""Completions through slots equal those of a call in which every row has a place, whoever waits for whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcpo_jax import batching, estimate, models, partition, sampler, slots, workload
from gcpo_jax.config import Mesh

V, T, ENDS = 24, 12, (0, 1, 2)
CONFIG = models.ModelConfig(
    family="qwen2", vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, qkv_bias=True,
)  # fmt: skip
PROMPTS = [[3 + (7 * b + k) % 20 for k in range(1 + b % 9)] for b in range(21)]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) * 0.4, models.shapes(CONFIG))


def sample(params, config=CONFIG, **changes):
    how = dict(key=jax.random.key(3), n=4, max_new_tokens=T, eos_ids=ENDS, max_rows=512) | changes
    return sampler.sample(config, params, PROMPTS, **how)


@pytest.mark.parametrize("max_rows", [3, 8])
def test_few_slots_give_the_completions_of_many(params, max_rows):
    whole = sample(params)
    lengths = {len(c) for group in whole.tokens for c in group}
    assert min(lengths) < 3 and max(lengths) == T  # some leave early, some fill their ring
    some = sample(params, max_rows=max_rows)
    assert some.tokens == whole.tokens
    for got, expected in zip(some.logprobs, whole.logprobs, strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("chunks", "max_rows", "mesh"), [(4, 512, False), (2, 8, False), (3, 24, True)])
def test_a_ring_in_chunks_gives_the_completions_of_one_that_is_whole(params, chunks, max_rows, mesh, monkeypatch):
    whole = sample(params)
    monkeypatch.setattr(slots, "ring_of", lambda T: (chunks, -(-T // chunks)))
    config = CONFIG
    if mesh:
        layout = partition.make_layout(partition.make_mesh(Mesh(data=2, fsdp=2, tensor=2)), CONFIG)
        config = dataclasses.replace(CONFIG, layout=layout)
        params = jax.device_put(params, layout.shardings(params))
    slots.run.clear_cache()  # programs are cached by arguments, of which the chunks' width is none
    some = sample(params, config, max_rows=max_rows)
    slots.run.clear_cache()
    assert some.tokens == whole.tokens
    for got, expected in zip(some.logprobs, whole.logprobs, strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_step_reads_only_chunks_in_use():
    assert slots.ring_of(127) == (1, 127) and slots.ring_of(16384) == (4, 4096) and slots.ring_of(1001) == (2, 501)
    call = workload.Call("sample", "sampler", rows=2, width=16, n=4, tokens=1024, steps=1024)
    assert estimate._share_read(call) == (1 + 2 + 3 + 4) / 16
    assert estimate._share_read(dataclasses.replace(call, steps=256)) == 1 / 4


def test_rows_that_share_a_prompt_in_few_slots_give_the_same(params):
    # A completion shorter than its prompt: the rows of a prompt stay together.
    assert sample(params, max_rows=8, max_new_tokens=4).tokens == sample(params, max_new_tokens=4).tokens


@pytest.mark.parametrize("max_rows", [8, 512])
def test_every_part_of_a_mesh_has_its_own_queue(params, max_rows):
    layout = partition.make_layout(partition.make_mesh(Mesh(data=2, fsdp=2, tensor=2)), CONFIG)
    config = dataclasses.replace(CONFIG, layout=layout)
    placed = jax.device_put(params, layout.shardings(params))
    assert sample(placed, config, max_rows=max_rows).tokens == sample(params).tokens


def test_an_index_of_ones_own_stands_for_the_place_in_the_list(params):
    whole = sample(params)
    how = dict(key=jax.random.key(3), n=4, max_new_tokens=T, eos_ids=ENDS)
    assert sampler.sample(CONFIG, params, PROMPTS[5:9], index=range(5, 9), **how).tokens == whole.tokens[5:9]


def test_calls_have_every_prompt_once_and_shapes_that_hold_them():
    lengths = [5] * 100 + [700] * 3 + [90] * 40
    found = list(sampler.calls(lengths, 4, 64, 32, 2, [[batching.whole([0])]] * 143))
    assert sorted(r for rows, _ in found for r in rows) == list(range(143))
    for rows, call in found:
        assert call.width >= max(lengths[r] for r in rows) and call.prompts >= len(rows)
        assert call.prompts % 2 == call.lanes % 2 == 0 and call.lanes * call.together <= 32
    assert [call.width for _, call in found] == [704, 96, 16]
    assert found[0][1].together == 4 and found[-1][1].together == 1


def test_prompts_that_begin_alike_sample_as_each_by_itself(params):
    first = [[3, 4, 5, 6, 7, 8, 9], [10, 11]]
    prompts = [[*f, *own] for f in first for own in ([12], [13, 14], [13, 15, 16, 17])]
    how = dict(key=jax.random.key(3), n=4, max_new_tokens=T, eos_ids=ENDS)
    expected = sampler.sample(CONFIG, params, prompts, **how)
    for max_rows in (512, 12):
        found = sampler.sample(CONFIG, params, prompts, alike=3, max_rows=max_rows, **how)
        assert found.tokens == expected.tokens
        np.testing.assert_allclose(found.logprobs[5][3], expected.logprobs[5][3], atol=1e-5)
