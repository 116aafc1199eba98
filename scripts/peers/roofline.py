"""How near decoding comes to the device's memory bandwidth, and the update to its matrix peak.

What is counted is what the mathematics needs, not what the program happens to do. A decoding step reads each matrix
once, the keys and values of a prompt once for the rows that share it, and those a row has drawn itself. The update's
FLOPs are 6 per parameter of a matrix and token, and the products of attention; nothing that is computed again.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import steps
import worker

from gcpo_jax import config as config_lib
from gcpo_jax import hardware, metrics, models, rollout
from gcpo_jax.sampler import Samples, sample


def of_spec(spec: dict[str, Any], dtype: str) -> models.ModelConfig:
    """The model of a spec, without a directory."""
    m = spec["model"]
    c = models.ModelConfig(family="qwen2", qkv_bias=True, tied_embeddings=True, dtype=dtype, **m)
    return models.for_devices(c)


def matrices(c: models.ModelConfig) -> tuple[int, int]:
    """Numbers in the matrices of the layers, and in the table that makes the logits."""
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size), c.vocab_size * c.hidden_size


def bandwidth() -> tuple[float, str]:
    """Bytes a second of the device's memory, and where the figure is from: its data sheet, or a sum of two vectors."""
    kind = jax.devices()[0].device_kind
    for device in hardware.DEVICES.values():
        if kind.startswith(device.kinds):
            return device.bandwidth, "data sheet"
    x = jnp.ones(1 << 26, jnp.float32)
    add = jax.jit(lambda x, y: x + y)
    add(x, x).block_until_ready()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        add(x, x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * x.nbytes / min(times), "measured"


def decode(spec: dict[str, Any]):
    """Sampling of all rows at once, less what it takes to draw one token, so without the prompts."""
    c = of_spec(spec, spec["dtype"])
    params, prompts, n, T = models.init_params(c), worker.prompt_ids(spec), spec["samples"], spec["new_tokens"]
    rows, (rate, source) = len(prompts) * n, bandwidth()
    layers, table = matrices(c)
    width = jnp.dtype(c.dtype).itemsize
    token = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    step = width * (layers + table + token * (len(prompts) * spec["prompt_tokens"] + rows * T / 2))

    def timed(number: int, new: int) -> float:
        began = time.perf_counter()
        sample(c, params, prompts, key=jax.random.key(number), n=n, max_new_tokens=new, max_rows=rows)
        return time.perf_counter() - began

    def work(number: int) -> dict[str, Any]:
        seconds = timed(number, T) - timed(number, 1)
        used = step * (T - 1) / seconds
        return {
            "tokens": rows * T,
            "decode_tokens_per_s": rows * (T - 1) / seconds,
            "of_peak": used / rate,
            "used": used,
            "peak": rate,
            "peak_from": source,
        }

    return work


class Drawn(rollout.Actor):
    """An actor whose candidates come out of a hat, since only what is done with them is timed."""

    def sample(self, prompts, n, max_new_tokens, key, done=None, **shared: int) -> Samples:
        """Uniform tokens."""
        size = (len(prompts), n, max_new_tokens)
        tokens = np.random.default_rng(0).integers(1, self.model_config.vocab_size, size).tolist()
        for b, group in enumerate(tokens):
            if done is not None:
                done(b, group)
        return Samples(tokens, np.zeros(size).tolist())

    def decode(self, completions, skip_special=True) -> list[str]:
        """Texts that are not looked at."""
        return ["" for _ in completions]


class Prompts:
    """The prompts of a spec by number, in place of a ContextBuilder."""

    def __init__(self, spec: dict[str, Any]):
        self._prompts, self.tokenizer = worker.prompt_ids(spec), self

    def query(self, problem: str) -> list[int]:
        """Prompt number `problem`."""
        return self._prompts[int(problem)]

    def decode(self, ids) -> str:
        """A text that is not looked at."""
        return ""


def update(spec: dict[str, Any]):
    """The update of preset grpo without a reference."""
    c = of_spec(spec, spec["dtype"])
    config = config_lib.Config(
        model=config_lib.Model(path="-", dtype=spec["dtype"]),
        data=config_lib.Data(path="-"),
        rollout=config_lib.Rollout(
            queries=spec["prompts"],
            group_size=spec["samples"],
            max_prompt_tokens=spec["prompt_tokens"],
            max_new_tokens=spec["new_tokens"],
        ),
        algorithm=config_lib.preset("grpo"),
    )
    steps.change(config, spec)
    contexts: Any = Prompts(spec)

    def actor(params: dict) -> rollout.Actor:
        return Drawn(config, c, params, contexts)

    def reward(prompt: str, completion: str, row: dict[str, Any]) -> float:
        row["asked"] += 1
        return float(row["asked"] % 2)

    run = steps.Steps(config, c, models.init_params(of_spec(spec, "float32")), reward, actor)
    layers, table = matrices(c)
    S, T, R = spec["prompt_tokens"] + spec["new_tokens"], spec["new_tokens"], spec["prompts"] * spec["samples"]
    attention = c.num_layers * c.num_heads * c.head_dim * S / 2  # of one product, of a token with those before it
    flops = 6 * R * (S * (layers + 2 * attention) + T * table)
    peak = metrics.peak_flops(spec["dtype"])

    def work(number: int) -> dict[str, Any]:
        row = run(number, [{"id": str(k), "problem": str(k), "asked": 0} for k in range(spec["prompts"])])
        used = flops / row["phases"]["time/update_s"]
        return {"tokens": R * S, "of_peak": used / peak, "used": used, "peak": peak, "phases": row["phases"]}

    return work


PARTS = {"decode": decode, "update": update}
