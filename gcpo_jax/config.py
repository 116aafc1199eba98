"""The settings of a run: typed dataclasses, their validation, and the presets of the algorithms.

A file of configs/ builds a Config; `--config configs/tiny.py:grpo` picks a preset and
`--config.learner.learning_rate=1e-4` overrides one field. Nothing here touches a device.
"""

import dataclasses
import pathlib
from typing import Any

# No `from __future__ import annotations` here: the override machinery reads the field types.


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the field, its value and what is allowed."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Model:
    """Which policy to start from and how to compute with it."""

    path: str = ""  # Hugging Face directory (config.json, *.safetensors, tokenizer.json)
    dtype: str = "float32"  # of parameters and activations: "float32" | "bfloat16"; logits, losses and sums are float32
    # What the backward pass recomputes: "none" | "dots" (all but products with parameters) | "full" (each layer whole)
    remat: str = "none"
    # Of whole sequences, in prefill, scoring and update: "plain" (XLA alone) | "cudnn" (CUDA GPUs, bfloat16) | "splash"
    # (TPUs) | "auto": the fused kernel where there is one for the device, else plain
    attention: str = "auto"


@dataclasses.dataclass(slots=True, kw_only=True)
class Data:
    """Where problems come from, how a prompt is made of one, and what rewards an answer."""

    task: str = "jsonl"  # "arithmetic" (generated) | "jsonl" (a file of problem/answer rows)
    path: str = ""  # jsonl: the training file, .jsonl or .jsonl.gz
    eval_path: str = ""  # jsonl: the held-out file; empty: `held_out` rows are split off `path`
    held_out: int = 64  # jsonl without eval_path: rows kept for evaluation
    problem_field: str = "problem"
    answer_field: str = "answer"
    prompt: str = "{problem}"  # the user's turn; {problem} is replaced
    reward: str = "tasks.math.reward"  # dotted path of reward(prompt, completion, row) -> float
    unsafe: bool = False  # run a policy's programs also where the system cannot confine them
    overlap: str = "refuse"  # a training problem that is an evaluation problem too: "refuse" | "allow" (it is counted)
    too_long: str = "drop"  # a prompt over rollout.max_prompt_tokens: "drop" (counted, named) | "refuse"
    directory: str = ""  # prepared data sets; empty: the user's cache directory


@dataclasses.dataclass(slots=True, kw_only=True)
class Rollout:
    """The groups that are sampled each step."""

    queries: int = 32  # B, prompts a step
    group_size: int = 8  # n, candidates of each prompt
    max_prompt_tokens: int = 512
    max_new_tokens: int = 512
    temperature: float = 1.0  # the policy is softmax(logits / temperature) everywhere
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    max_rows: int = 512  # rows that the sampler or scorer has on the device at once; memory, never results


@dataclasses.dataclass(slots=True, kw_only=True)
class Contexts:
    """The prompts that show the policy its own candidates (ALGORITHM: integration and leave-one-out)."""

    style: str = "auto"  # "chat" (template) | "base" (plain text) | "tiny" (separator tokens) | "auto"
    text: str = "auto"  # of a candidate: "full" | "answer" (after </think>) | "auto" (answer where there is one)
    cap: int = 256  # tokens of one candidate inside a context; the last ones are kept
    permute: bool = True  # candidates in one random order per query, else in index order
    # "causal" (a candidate sees those before it) | "block" (it sees the problem alone, so all contexts share it)
    attention: str = "causal"


@dataclasses.dataclass(slots=True, kw_only=True)
class Algorithm:
    """The objective. PRESETS below fills this in; symbols are the paper's."""

    objective: str = "clipped"  # "clipped" (GRPO family) | "gvpo"
    advantage_scale: str = "std"  # Eq. 8: "std" | "none" (Dr.GRPO)
    aggregation: str = "sequence_mean"  # | "token_mean" | "constant" (sum over tokens / max_new_tokens)
    clip_low: float = 0.2  # ε below
    clip_high: float = 0.2  # ε above
    beta: float = 0.04  # β, weight of KL(policy, frozen reference); with objective "gvpo" the β of GVPO
    causal_factor: str = "none"  # Υ: "none" (B = A) | "projection" (Eq. 11) | "bayes" (reweighted candidates)
    similarity: str = "cosine"  # in Eq. 11: "cosine" | "euclidean" | "gaussian"
    correction: str = "psi"  # Z̄ - Z̄' in Eq. 11: "psi" | "zero" (centroid only) | "permuted" (across the batch)
    clip_negative: bool = True  # Υ < 0 becomes 0; False: it flips the sign of the advantage (as printed)
    alpha: float = 2.0  # α of Eq. 11
    kappa: float = 0.0  # κ, weight of KL' towards the projected reference (Eq. 12-13); 0: no KL'
    sampling: str = "shared"  # of Φ's integrated outputs: "shared" (as printed) | "swap" (leave-one-out, unbiased)
    integrated: int = 2  # L, integrated outputs (or swap partners) per target; 0: n
    rollouts: int = 2  # R, roll-outs per context; 0: n
    rollout_tokens: int = 64  # M, tokens of a roll-out; 0, or more than that: max_new_tokens
    kl_targets: int = 1  # candidates per group that enter KL', weighted n/k; 0: all
    # Whether the gradient of KL' flows through x_i too, or takes its keys and values for constants (of contexts in
    # blocks: those of problem and candidates)
    context_gradient: bool = False


@dataclasses.dataclass(slots=True, kw_only=True)
class Learner:
    """The optimizer and how a batch is cut up."""

    optimizer: str = "adamw"  # | "adafactor" (no first moment, the second factored: far less memory, other steps)
    moments_dtype: str = "float32"  # of AdamW's first moment; "bfloat16" saves a quarter of the state
    learning_rate: float = 1e-6
    schedule: str = "cosine"  # "cosine" (to zero one update after the last) | "constant", both after a linear warm-up
    warmup: float = 0.1  # share of all updates
    weight_decay: float = 0.01
    b1: float = 0.9  # of AdamW, as b2
    b2: float = 0.95
    max_grad_norm: float = 1.0
    updates_per_batch: int = 1  # μ
    micro_batch: int = 64  # rows differentiated at a time; whole groups; memory and cache, never results


@dataclasses.dataclass(slots=True, kw_only=True)
class Mesh:
    """How many devices share the work, and what they cut. One size may be -1: as many as there are devices left."""

    data: int = 1  # rows
    fsdp: int = 1  # rows; and parameters and optimizer state
    tensor: int = 1  # heads, MLP and vocabulary


@dataclasses.dataclass(slots=True, kw_only=True)
class Evaluation:
    """Held-out accuracy during the run."""

    every: int = 0  # steps; 0: only before the first and after the last update
    problems: int = 256  # at most
    benchmarks: str = ""  # files, separated by commas, whose problems must not be trained on (data.overlap)
    samples: int = 4  # m per problem, at rollout.temperature; greedy is always measured too


@dataclasses.dataclass(slots=True, kw_only=True)
class Checkpoint:
    """How often the whole state is saved."""

    every: int = 20  # steps
    keep: int = 2


@dataclasses.dataclass(slots=True, kw_only=True)
class Train:
    """Length, seed and what is written."""

    total_steps: int = 100
    seed: int = 0
    log_groups: int = 1  # groups written to completions.jsonl each step
    audit_steps: tuple[int, ...] = ()  # steps whose every quantity is written, by updates done before (0: the first)


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
    """One run."""

    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    contexts: Contexts = dataclasses.field(default_factory=Contexts)
    algorithm: Algorithm = dataclasses.field(default_factory=Algorithm)
    learner: Learner = dataclasses.field(default_factory=Learner)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    train: Train = dataclasses.field(default_factory=Train)


_GCPO: dict[str, Any] = {"causal_factor": "projection", "kappa": 0.06}
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage_scale": "none", "aggregation": "constant", "beta": 0.0},
    "gvpo": {"objective": "gvpo", "advantage_scale": "none", "beta": 0.1},
    "gcpo": _GCPO,
    "gcpo_paper": _GCPO
    | {"integrated": 0, "rollouts": 0, "rollout_tokens": 0, "kl_targets": 0}
    | {"clip_negative": False, "context_gradient": True},
    "gcpo_loo": _GCPO | {"sampling": "swap"},
    "gcpo_bayes": _GCPO | {"causal_factor": "bayes"},
    "gcpo_no_adv": _GCPO | {"causal_factor": "none"},
    "gcpo_no_kl": _GCPO | {"kappa": 0.0},
    "gcpo_centroid": _GCPO | {"correction": "zero"},
    "gcpo_noise": _GCPO | {"correction": "permuted"},
}


def preset(name: str | None) -> Algorithm:
    """The Algorithm of a preset; None means "gcpo".

    Raises:
      ConfigError: for an unknown name; the message lists the known ones.
    """
    name = name or "gcpo"
    if name not in PRESETS:
        raise ConfigError(f"unknown variant {name!r}; known: {', '.join(PRESETS)}")
    return Algorithm(**PRESETS[name])


def flatten(config: Any) -> dict[str, Any]:
    """{"section.field": value} of a dataclass of settings, in its order; tuples as lists, as JSON gives them back."""
    flat = {}
    for section, fields in dataclasses.asdict(config).items():
        named = (
            {f"{section}.{name}": v for name, v in fields.items()} if isinstance(fields, dict) else {section: fields}
        )
        flat |= {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}
    return flat


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What single fields may be, by name."""

    choices: dict[str, tuple[str, ...]]
    at_least: dict[str, float | int]
    above: dict[str, float | int]
    at_most: dict[str, float | int]
    below: dict[str, float | int] = dataclasses.field(default_factory=dict)


_CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "plain", "cudnn", "splash"),
    "model.remat": ("none", "dots", "full"),
    "data.task": ("arithmetic", "jsonl"),
    "data.overlap": ("refuse", "allow"),
    "data.too_long": ("drop", "refuse"),
    "contexts.attention": ("causal", "block"),
    "contexts.style": ("auto", "chat", "base", "tiny"),
    "contexts.text": ("auto", "full", "answer"),
    "algorithm.objective": ("clipped", "gvpo"),
    "algorithm.advantage_scale": ("std", "none"),
    "algorithm.aggregation": ("sequence_mean", "token_mean", "constant"),
    "algorithm.causal_factor": ("none", "projection", "bayes"),
    "algorithm.similarity": ("cosine", "euclidean", "gaussian"),
    "algorithm.correction": ("psi", "zero", "permuted"),
    "algorithm.sampling": ("shared", "swap"),
    "learner.optimizer": ("adamw", "adafactor"),
    "learner.moments_dtype": ("float32", "bfloat16"),
    "learner.schedule": ("cosine", "constant"),
}
_AT_LEAST: dict[str, float | int] = {  # inclusive
    "data.held_out": 0,
    "rollout.queries": 1,
    "rollout.group_size": 2,
    "rollout.max_prompt_tokens": 1,
    "rollout.max_new_tokens": 1,
    "rollout.top_k": 0,
    "rollout.max_rows": 1,
    "contexts.cap": 1,
    "algorithm.beta": 0,
    "algorithm.kappa": 0,
    "algorithm.clip_low": 0,
    "algorithm.clip_high": 0,
    "algorithm.integrated": 0,
    "algorithm.rollouts": 0,
    "algorithm.rollout_tokens": 0,
    "algorithm.kl_targets": 0,
    "learner.learning_rate": 0,
    "learner.warmup": 0,
    "learner.weight_decay": 0,
    "learner.updates_per_batch": 1,
    "learner.micro_batch": 1,
    "evaluation.every": 0,
    "evaluation.problems": 1,
    "evaluation.samples": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "train.total_steps": 1,
    "train.seed": 0,
    "train.log_groups": 0,
}
_ABOVE: dict[str, float | int] = {"rollout.temperature": 0, "rollout.top_p": 0, "learner.max_grad_norm": 0}
_AT_MOST: dict[str, float | int] = {"rollout.top_p": 1, "learner.warmup": 1, "algorithm.clip_low": 1}
_BELOW: dict[str, float | int] = {"learner.b1": 1, "learner.b2": 1}


RULES = Rules(choices=_CHOICES, at_least=_AT_LEAST, above=_ABOVE, at_most=_AT_MOST, below=_BELOW)


def check_fields(values: dict[str, Any], defaults: dict[str, Any], rules: Rules) -> list[str]:
    """What is wrong with each field by itself: its type, its bounds; nothing where all are right.

    Raises:
      ConfigError: where a type is wrong, since nothing else can be said about such a field.
    """
    wrong = []

    def need(ok: bool, field: str, allowed: str) -> None:
        if not ok:
            wrong.append(f"{field}={values[field]!r}: {allowed}")

    for name, default in defaults.items():
        kind, value = type(default), values[name]
        # An override of a tuple takes any words, and a recipe is Python: neither is checked before.
        if kind is list:
            ok = isinstance(value, list) and all(type(v) is int for v in value)
            need(ok, name, "must be whole numbers: 0, or 0,5")
        else:
            ok = type(value) is kind or (kind is float and type(value) is int)
            need(ok, name, f"must be of type {kind.__name__}")
    if wrong:
        raise ConfigError("; ".join(wrong))
    for name, value in values.items():
        if isinstance(value, float):
            need(value == value and abs(value) != float("inf"), name, "must be a finite number")
    for name, choices in rules.choices.items():
        need(values[name] in choices, name, f"must be one of {', '.join(choices)}")
    for name, bound in rules.at_least.items():
        need(values[name] >= bound, name, f"must be at least {bound:g}")
    for name, bound in rules.above.items():
        need(values[name] > bound, name, f"must be above {bound:g}")
    for name, bound in rules.at_most.items():
        need(values[name] <= bound, name, f"must be at most {bound:g}")
    for name, bound in rules.below.items():
        need(0 <= values[name] < bound, name, f"must be in [0, {bound:g})")
    return wrong


def check_mesh(mesh: Mesh) -> list[str]:
    """What is wrong with the sizes of a mesh; nothing where they are right."""
    sizes, wrong = dataclasses.asdict(mesh), []
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            wrong.append(f"mesh.{axis}={size}: must be at least 1, or -1 for what is left")
        elif size == -1 and list(sizes.values()).count(-1) > 1:
            wrong.append(f"mesh.{axis}={size}: must be -1 for one axis at most")
    return wrong


def validate(config: Config) -> None:
    """Check every field and the ways in which fields depend on each other, before any device work.

    Raises:
      ConfigError: naming each wrong field, its value and what is allowed.
    """
    values = flatten(config)
    wrong = check_fields(values, flatten(Config()), RULES)

    def need(ok: bool, field: str, allowed: str) -> None:
        if not ok:
            wrong.append(f"{field}={values[field]!r}: {allowed}")

    a, n = config.algorithm, config.rollout.group_size
    need(bool(config.model.path), "model.path", "must name a Hugging Face model directory")
    if config.data.task == "jsonl":
        need(bool(config.data.path), "data.path", "must name a .jsonl or .jsonl.gz file")
        need("{problem}" in config.data.prompt, "data.prompt", "must contain {problem}")
        if not config.data.eval_path:
            need(config.data.held_out >= 1, "data.held_out", "must be at least 1 where data.eval_path is empty")
    if config.model.attention == "cudnn":
        need(config.model.dtype == "bfloat16", "model.dtype", "must be bfloat16 with model.attention=cudnn")
    if a.objective == "gvpo":
        need(a.causal_factor == "none", "algorithm.causal_factor", "must be none with objective gvpo")
        need(a.kappa == 0, "algorithm.kappa", "must be 0 with objective gvpo")
        need(a.beta > 0, "algorithm.beta", "must be above 0 with objective gvpo")
    partners = n - 1 if a.sampling == "swap" else n
    uses_contexts = a.kappa > 0 or a.causal_factor != "none"
    if uses_contexts:
        need(
            a.integrated == 0 or 2 <= a.integrated <= partners,
            "algorithm.integrated",
            f"must be 0 (all) or between 2 and {partners}: with one, Psi vanishes identically",
        )
        need(partners >= 2, "rollout.group_size", "must be at least 3 with algorithm.sampling=swap")
        need(a.kl_targets <= n, "algorithm.kl_targets", f"must be at most rollout.group_size={n}")
    if config.learner.optimizer == "adafactor":
        need(config.learner.moments_dtype == "float32", "learner.moments_dtype", "must be float32 with adafactor")
    if a.causal_factor == "bayes":
        need(a.sampling == "shared", "algorithm.sampling", "must be shared with causal_factor bayes")
    wrong += check_mesh(config.mesh)
    if config.contexts.attention == "block":
        need(not config.train.audit_steps, "train.audit_steps", "must be empty with contexts.attention=block")
    for step in config.train.audit_steps:
        need(0 <= step < config.train.total_steps, "train.audit_steps", "must be in [0, train.total_steps)")
    if wrong:
        raise ConfigError("; ".join(wrong))


def check_paths(config: Config) -> None:
    """Check that the named files are there.

    Raises:
      ConfigError: naming the field and the path.
    """
    named = [("model.path", config.model.path, "config.json")]
    if config.data.task == "jsonl":
        named += [("data.path", config.data.path, "")]
        named += [("data.eval_path", config.data.eval_path, "")] if config.data.eval_path else []
    named += [("evaluation.benchmarks", path, "") for path in config.evaluation.benchmarks.split(",") if path]
    for field, path, inside in named:
        if not (pathlib.Path(path) / inside).exists():
            raise ConfigError(f"{field}={path!r}: {pathlib.Path(path) / inside} does not exist")
