"""The settings of an evaluation, as config.py has those of a training run.

`--config.sampling.samples=4` overrides one; a file of configs/ whose get_config returns an EvalConfig sets them all.
"""

import dataclasses
import json
import pathlib

from gcpo_jax import config as config_lib
from gcpo_jax.config import ConfigError, Contexts, Mesh, flatten
from gcpo_jax.tasks import benchmarks, resolve_reward

# No `from __future__ import annotations` here: the override machinery reads the field types.


@dataclasses.dataclass(slots=True, kw_only=True)
class Policy:
    """Which policy is evaluated."""

    path: str = ""  # Hugging Face directory: a base model, or the policy/ of a run
    dtype: str = "bfloat16"  # of parameters and activations: "float32" | "bfloat16"
    attention: str = "auto"  # of prompts: "plain" | "cudnn" | "splash" | "auto", as in a training run


@dataclasses.dataclass(slots=True, kw_only=True)
class Sampling:
    """The completions of each problem. The defaults are the paper's; temperature and top_p the policies' makers'."""

    samples: int = 20  # n
    temperature: float = 0.6  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 0.95
    max_new_tokens: int = 16384
    max_rows: int = 64  # completions sampled at a time; memory, never results beyond rounding
    seed: int = 0


@dataclasses.dataclass(slots=True, kw_only=True)
class Input:
    """What the policy is shown (the paper's Fig. 6); forms.py says what each is here."""

    form: str = "q"  # "q" (the query) | "x" (with other candidates and an integrated output) | "projected"
    candidates: int = 8  # n of x: so many are sampled, all but one shown
    integrated: int = 2  # L of projected: contexts that Φ averages over


@dataclasses.dataclass(slots=True, kw_only=True)
class Prompts:
    """The user's turn by form of the problem; {problem} is replaced. Base models go on writing code without it."""

    answer: str = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    code: str = "{problem}\n\nReply with the whole program in one fenced Python block."


@dataclasses.dataclass(slots=True, kw_only=True)
class EvalConfig:
    """One evaluation."""

    benchmarks: str = ",".join(benchmarks.FIVE)  # names or paths of files, separated by commas
    data: str = ""  # the directory that has the files of the named ones
    limit: int = 0  # problems of each benchmark; 0: all
    reward: str = "tasks.math.reward"  # of problems with an answer: right where it is 1 or more
    unsafe: bool = False  # run programs also where this system cannot shut them in
    model: Policy = dataclasses.field(default_factory=Policy)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    input: Input = dataclasses.field(default_factory=Input)
    prompts: Prompts = dataclasses.field(default_factory=Prompts)
    contexts: Contexts = dataclasses.field(default_factory=Contexts)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)


# What may differ when an evaluation goes on: a stored completion would have come out the same.
MAY_CHANGE = frozenset(
    {
        "benchmarks",
        "data",
        "limit",
        "unsafe",
        "model.path",
        "model.attention",
        "sampling.max_rows",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
    }
)
# Fields that have a flag of their own.
SHORT = ("data", "benchmarks", "limit", "reward", "unsafe")

_RULES = config_lib.Rules(
    choices={
        "model.attention": ("auto", "plain", "cudnn", "splash"),
        "model.dtype": ("float32", "bfloat16"),
        "input.form": ("q", "x", "projected"),
        "contexts.attention": ("causal", "block"),
        "contexts.style": ("auto", "chat", "base", "tiny"),
        "contexts.text": ("auto", "full", "answer"),
    },
    at_least={
        "limit": 0,
        "sampling.samples": 1,
        "sampling.temperature": 0,
        "sampling.top_k": 0,
        "sampling.max_new_tokens": 1,
        "sampling.max_rows": 1,
        "sampling.seed": 0,
        "input.candidates": 2,
        "input.integrated": 2,
        "contexts.cap": 1,
    },
    above={"sampling.top_p": 0},
    at_most={"sampling.top_p": 1, "sampling.seed": 2**31 - 1},
)


def stored(workdir: pathlib.Path) -> EvalConfig:
    """The settings of an evaluation that was begun.

    Raises:
      ConfigError: where the directory holds none.
    """
    try:
        saved = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["config"]
        config = EvalConfig()
        for name, value in saved.items():
            section, dot, field = name.rpartition(".")
            setattr(getattr(config, section) if dot else config, field, value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{workdir} holds no evaluation: {workdir / 'config.json'}: {error!r}") from error
    return config


def names(config: EvalConfig) -> list[str]:
    """The benchmarks that are named, in order, each once."""
    return list(dict.fromkeys(filter(None, (name.strip() for name in config.benchmarks.split(",")))))


def validate(config: EvalConfig, needs_model: bool = True) -> None:
    """Check every field, before any device work.

    Raises:
      ConfigError: naming each wrong field, its value and what is allowed; or the path that does not exist.
    """
    values = flatten(config)
    wrong = config_lib.check_fields(values, flatten(EvalConfig()), _RULES) + config_lib.check_mesh(config.mesh)
    for field in ("prompts.answer", "prompts.code"):
        if "{problem}" not in values[field]:
            wrong.append(f"{field}={values[field]!r}: must contain {{problem}}")
    if values["contexts.attention"] == "block" and values["input.form"] == "projected":
        wrong.append("contexts.attention='block': must be causal with input.form=projected")
    if not names(config):
        wrong.append(f"benchmarks={config.benchmarks!r}: must name one of {', '.join(benchmarks.NAMED)}, or a file")
    if needs_model and not config.model.path:
        wrong.append("model.path='': must name a Hugging Face model directory")
    if wrong:
        raise ConfigError("; ".join(wrong))
    if needs_model and not (pathlib.Path(config.model.path) / "config.json").exists():
        raise ConfigError(f"model.path={config.model.path!r}: {config.model.path}/config.json does not exist")
    resolve_reward(config.reward)
