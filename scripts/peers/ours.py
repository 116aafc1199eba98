"""gcpo_jax itself: its sampler, whole steps as train.py makes them, and what sharing a prompt saves."""

import dataclasses
import os
import pathlib
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import paper
import roofline
import shared
import steps
import worker

from gcpo_jax import models, train
from gcpo_jax.sampler import sample

PACKAGES = ("gcpo_jax", "jax", "flax")


class Compilations:
    """Counts what is compiled: in a timed run it should be nothing."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, *_, **__) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def sampling(spec: dict[str, Any], model_config: models.ModelConfig, params: dict):
    """All prompts in one call of `rows` slots, or (slots false) batches of `rows` rows one after the other."""
    prompts, n = worker.prompt_ids(spec), spec["samples"]
    size = len(prompts) if spec["slots"] else spec["rows"] // n
    batches = [prompts[k : k + size] for k in range(0, len(prompts), size)]

    def work(number: int) -> dict[str, Any]:
        tokens = 0
        for k, batch in enumerate(batches):
            samples = sample(
                model_config,
                params,
                batch,
                key=jax.random.key(number * len(batches) + k),
                n=n,
                max_new_tokens=spec["new_tokens"],
                eos_ids=spec["end_ids"],
                max_rows=spec["rows"],
            )
            tokens += sum(len(ids) for group in samples.tokens for ids in group)
        return {"tokens": tokens}

    return work


def main() -> None:
    """Do what the first line of standard input says."""
    pipe = worker.Pipe()
    spec, compilations = pipe.spec, Compilations()
    train.cache_compilations()
    # All lengths of gcpo_paper's steps here are fixed: one step compiles everything, and takes long enough.
    warm = 1 if spec.get("preset") == "gcpo_paper" else 2
    if spec["work"] == "recipe":
        # Its shapes follow the problems: every step is done once before it is timed.
        work, warm = steps.recipe(spec), spec["rounds"]
    elif spec["work"] in roofline.PARTS:
        work = roofline.PARTS[spec["work"]](spec)
    else:
        model_config, params = models.load_pretrained(pathlib.Path(spec["directory"]))
        model_config = models.for_devices(dataclasses.replace(model_config, eos_ids=tuple(spec["end_ids"])))
        builders = {"sampling": sampling, "step": steps.step, "loop": paper.loop} | shared.PARTS
        work = builders[spec["work"]](spec, model_config, params)

    def counted(number: int) -> dict[str, Any]:
        before = compilations.count
        row = work(number)
        return row | {"compilations": compilations.count - before}

    worker.serve(pipe, PACKAGES, counted, warm)


if __name__ == "__main__":
    main()
