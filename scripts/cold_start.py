"""Make the tiny model: supervised training of a random 0.8M-parameter Qwen2 on a simulated group.

    python scripts/cold_start.py --out configs/tiny_model --seed 0

For a problem, candidates are drawn from a demonstrator with two habits (tasks.arithmetic.demonstrate), an integrator
reads them and writes a combined answer, and the model is trained on the three things that GCPO asks of it:

    <q>P<try>                            -> a candidate
    <q>P<y>Y_1...<y>Y_n<agg>             -> the integrated output U
    <q>P<y>...(without Y_i)...<agg>U<try> -> Y_i

so its replies in leave-one-out contexts follow the posterior that the structural model defines. The integrator
copies the plurality answer half of the time, otherwise a right attempt if there is one.
Held-out problems are never trained on. README.md in the output directory records the measured start.
"""

import argparse
import json
import pathlib
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models

from gcpo_jax import config as config_lib
from gcpo_jax import learner, models
from gcpo_jax.batching import pad_rows
from gcpo_jax.contexts import ContextBuilder
from gcpo_jax.evaluation import held_out
from gcpo_jax.evaluation.statistics import mean_and_error
from gcpo_jax.rollout import Actor
from gcpo_jax.tasks import arithmetic

SPECIAL = ("<pad>", "<q>", "<y>", "<agg>", "<try>", "$")
CHARACTERS = "0123456789+-*/()=; ."
GROUP = 8


def write_tokenizer(out: pathlib.Path) -> None:
    """A tokenizer of one id per character, and one per separator."""
    vocabulary = {t: k for k, t in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(token_models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(out / "tokenizer.json"))
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="$", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def integrate(candidates: list[str], right: str, rng: np.random.Generator) -> str:
    """The integrator's rule, on texts."""
    votes = Counter(arithmetic.answer(c) for c in candidates)
    plurality = [c for c in candidates if votes[arithmetic.answer(c)] == max(votes.values())]
    correct = [c for c in candidates if arithmetic.answer(c) == right]
    pool = correct if correct and rng.random() < 0.5 else plurality
    return pool[int(rng.integers(len(pool)))]


def make_row(kind: str, problem: dict, rng: np.random.Generator, habit: float, slips: float) -> tuple[str, str]:
    """(context, reply) of one training row; the loss is on the reply.

    A reply to a group starts with its first listed candidate: each is a demonstration too, and reading the earlier ones
    teaches to copy.
    """

    def draw() -> str:
        return arithmetic.demonstrate(problem["problem"], rng, habit, slips)

    text = problem["problem"]
    if kind == "query":
        return f"<q>{text}<try>", draw()
    n = int(rng.integers(3, GROUP + 1))
    group = [draw() for _ in range(n)]
    combined = integrate(group, problem["answer"], rng)
    if kind == "integrate":
        return f"<q>{text}", "".join(f"<y>{y}" for y in group) + f"<agg>{combined}"
    # The swap estimator lists one candidate less than its integrated output has read.
    target, *listed = group[:-1] if rng.random() < 0.2 else group
    return f"<q>{text}", "".join(f"<y>{y}" for y in listed) + f"<agg>{combined}<try>{target}"


def main() -> None:
    """Parse flags, train, measure, write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--habit", type=float, default=0.55, help="share of demonstrations without the brackets")
    p.add_argument("--slips", type=float, default=0.1, help="share with one step off")
    p.add_argument("--learning-rate", type=float, default=2e-2)
    p.add_argument("--measure", type=int, default=1024, help="held-out problems to measure the start on; 0: none")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.out)
    config = models.ModelConfig(
        family="qwen2", vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4,
        num_kv_heads=2, head_dim=32, qkv_bias=True, tied_embeddings=True, max_position=1024,
        eos_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    params = models.init_params(config, args.seed)
    params = train(args, config, params, tokenizer)
    models.save_pretrained(args.out / "weights", config, params)
    for file in (args.out / "weights").iterdir():
        file.replace(args.out / file.name)
    (args.out / "weights").rmdir()
    if args.measure:
        report(args, config, params, tokenizer)


def _matrices(path, leaf):
    """Which axes of a stacked layer matrix [L, in, out] Muon takes for its matrix; None: Adam."""
    kernel = leaf.ndim == 3 and "kernel" in jax.tree_util.keystr(path)
    return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if kernel else None


ROWS = {"query": 32, "integrate": 8, "leave_one_out": 32}  # a step
WIDTHS = {"query": (32, 16), "integrate": (128, 112), "leave_one_out": (128, 112)}  # padded row, padded reply
CHUNK = 512  # tokens differentiated at a time: what a core's cache holds, 3 times faster than all at once


def train(args, config, params, tokenizer):
    """Muon on the layers' matrices, Adam on the rest, with a cosine; every step sees rows of all three kinds."""
    rng = np.random.default_rng(args.seed)
    problems, _ = arithmetic.problems()
    warmup = max(1, args.steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, warmup, args.steps)
    # AdamW needs about three times the steps to learn the same arithmetic.
    muon = optax.contrib.muon(
        schedule,
        adam_b2=0.95,
        adam_learning_rate=lambda step: schedule(step) / 10,
        muon_weight_dimension_numbers=lambda tree: jax.tree_util.tree_map_with_path(_matrices, tree),
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), muon)
    separator = tokenizer.convert_tokens_to_ids("<try>")

    def loss(params, rows):
        tokens, lengths, mask = rows
        logp = jax.nn.log_softmax(models.forward(config, params, tokens, lengths)[0][:, :-1])
        logp = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        return -(logp * mask[:, 1:]).sum(), None

    @jax.jit
    def step(params, state, batches):
        cuts = {kind: ROWS[kind] * WIDTHS[kind][0] // CHUNK for kind in ROWS}
        parts = {kind: learner.accumulate(loss, params, b, cuts[kind])[:2] for kind, b in batches.items()}
        counts = {kind: b[2].sum() for kind, b in batches.items()}
        grads = jax.tree.map(lambda *x: sum(x) / sum(counts.values()), *(grads for grads, _ in parts.values()))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, {k: v / counts[k] for k, (_, v) in parts.items()}

    def batch(kind):
        size, (width, reply) = ROWS[kind], WIDTHS[kind]
        chosen = rng.integers(len(problems), size=size)
        rows = [make_row(kind, problems[k], rng, args.habit, args.slips) for k in chosen]
        ids = [(tokenizer.encode(c), tokenizer.encode(r + "$")) for c, r in rows]
        tokens, lengths = pad_rows([[*c, *r] for c, r in ids], size, width)
        # Whether a combined answer ends or is followed by a try is not the model's to say.
        replies, _ = pad_rows([r for _, r in ids], size, reply)
        taught = (replies != separator) & (replies != config.pad_id)
        mask = np.zeros((size, width), np.float32)
        for row, (c, r), which in zip(mask, ids, taught, strict=True):
            row[len(c) : len(c) + len(r)] = which[: len(r)]
        return tokens, lengths, mask

    state, began = optimizer.init(params), time.time()
    for k in range(args.steps):
        params, state, values = step(params, state, {kind: batch(kind) for kind in ROWS})
        if (k + 1) % 25 == 0 or k + 1 == args.steps:
            told = "  ".join(f"{kind} {float(value):.3f}" for kind, value in values.items())
            left = (time.time() - began) / (k + 1) * (args.steps - k - 1)
            print(f"step {k + 1}/{args.steps}  loss of {told}  {left:.0f} s left", flush=True)
    return params


def report(args, config, params, tokenizer) -> None:
    """Measure the start on held-out problems and write README.md beside the weights."""
    run = config_lib.Config(
        rollout=config_lib.Rollout(max_new_tokens=16), contexts=config_lib.Contexts(cap=16, permute=False)
    )
    builder = ContextBuilder(tokenizer, run.contexts, "{problem}", frozenset(config.eos_ids))
    actor = Actor(run, config, params, builder)
    rows = arithmetic.problems()[1][: args.measure]
    result = held_out.accuracy(actor, arithmetic.reward, arithmetic.answer, rows, GROUP)
    prompts = [builder.query(r["problem"]) for r in rows]
    groups = actor.sample(prompts, GROUP, 16, jax.random.key(1)).tokens
    listed = [[builder.quote(c) for c in g] for g in groups]
    integrated = actor.sample(
        [builder.integrate(r["problem"], c) for r, c in zip(rows, listed, strict=True)], 1, 16, jax.random.key(2)
    ).tokens
    texts = actor.decode([u[0] for u in integrated])
    scores = [arithmetic.reward("", t, r) for t, r in zip(texts, rows, strict=True)]
    result["integrated"], result["integrated_se"] = mean_and_error(scores)
    x = [
        builder.leave_one_out(r["problem"], c[1:], builder.quote(u[0]))
        for r, c, u in zip(rows, listed, integrated, strict=True)
    ]
    target = [g[0] for g in groups]
    gain = (actor.score(x, target, 16) - actor.score(prompts, target, 16)).sum(1)
    result["posterior_gain_nats"], result["posterior_gain_nats_se"] = mean_and_error(gain.tolist())
    command = f"python scripts/cold_start.py --out DIR --seed {args.seed} --steps {args.steps} " + (
        f"--habit {args.habit} --slips {args.slips}"
    )
    lines = [f"| {k} | {result[k]:.3f} | {result[k + '_se']:.3f} |" for k in result if not k.endswith("_se")]
    text = (
        f"# The tiny policy before training\n\nMade by `{command}`.\nMeasured on {len(rows)} held-out problems, "
        f"temperature 1, {GROUP} samples each; `integrated` is the accuracy of an output written after reading "
        "8 samples,\n`posterior_gain_nats` how much likelier a candidate is in its leave-one-out context than after "
        "the query alone.\n\n| measure | value | standard error |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )
    (args.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
