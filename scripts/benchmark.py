"""Speed, against peers on the same work and against ourselves, in alternating rounds of one run.

    python scripts/benchmark.py sampling --tunix=PYTHON --trl=PYTHON     tokens a second
    python scripts/benchmark.py step --tunix=PYTHON --trl=PYTHON         one whole GRPO step
    python scripts/benchmark.py ragged --tunix=PYTHON --trl=PYTHON       256 completions of unequal length, 32 at a time
    python scripts/benchmark.py shared                                   what n samples of a long prompt share
    python scripts/benchmark.py gcpo --smollm2=DIR --data TRAIN HELD     steps of gcpo against steps of grpo
    python scripts/benchmark.py paper                                    steps of gcpo_paper against a loop
    python scripts/benchmark.py contexts                                 steps with contexts in blocks, and causal ones
    python scripts/benchmark.py startup                                  the command until its first update
    python scripts/benchmark.py overlap --smollm2=DIR --data TRAIN HELD  what a step waits for that is no device's work
    python scripts/benchmark.py roofline                                 against the device's bandwidth and matrix peak

PYTHON is the interpreter of an environment that has google-tunix 0.1.7, or trl 1.16 and torch (docs/benchmarks.md).
A peer that is not named is left out. Each contender is a process of its own that computes only when it is its turn.
Prints a table and writes docs/results/benchmark_NAME.json (--out names another file).
"""

import argparse
import json
import math
import pathlib
import shlex
import sys
import tempfile
from typing import Any

import jax
import rounds as rounds_lib
import startup
from peers import worker
from rounds import Contender
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models

# The package of this checkout, whatever is installed, as for its contenders.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import waiting

from gcpo_jax import config as config_lib
from gcpo_jax import models, provenance

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
# All Qwen2 with tied embeddings, in float32 on whatever device there is.
MODELS = {
    name: dict(zip(NAMES, sizes, strict=True))
    for name, sizes in {
        "micro": (64, 16, 2, 2, 1, 8, 32),  # a second's work: is all of it there?
        "small": (512, 128, 4, 4, 2, 32, 512),
        "medium": (1024, 256, 4, 4, 2, 64, 1024),
        "large": (2048, 384, 6, 6, 2, 64, 1536),
        "1.5b": (151936, 1536, 28, 12, 2, 128, 8960),
    }.items()
}
BATCH = {"prompts": 4, "samples": 8, "rows": 32, "prompt_tokens": 64, "new_tokens": 128, "seed": 0}
PEERS = {"tunix": "with_tunix.py", "trl": "with_trl.py"}


def never(shape: str) -> list[int]:
    """An end id that no model has, so that every completion gets its full length."""
    return [MODELS[shape]["vocab_size"]]


def write_model(directory: pathlib.Path, shape: str) -> str:
    """A directory with random weights, and a tokenizer whose words are the numbers of the ids."""
    path = directory / shape
    if not path.exists():
        config = models.ModelConfig(family="qwen2", qkv_bias=True, tied_embeddings=True, **MODELS[shape])
        models.save_pretrained(path, config, models.init_params(config))
        vocabulary = worker.words(config.vocab_size)
        tokenizer = Tokenizer(token_models.WordLevel({w: k for k, w in enumerate(vocabulary)}, unk_token="0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(list(worker.MARKS))
        tokenizer.save(str(path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(path)


def ours(name: str, spec: dict[str, Any]) -> Contender:
    """A contender of this package."""
    return Contender(name, sys.executable, "ours.py", spec)


def against_peers(args: argparse.Namespace, mine: list[Contender], spec: dict[str, Any]) -> list[Contender]:
    """Ours and, with the same spec, those peers that have an interpreter."""
    named = {name: getattr(args, name) for name in PEERS}
    return mine + [Contender(name, python, PEERS[name], spec) for name, python in named.items() if python]


def sampling(args: argparse.Namespace, scratch: pathlib.Path) -> dict[str, list[Contender]]:
    """4 prompts x 8 samples, all of full length."""
    cases = {}
    for shape in args.shapes:
        spec = {"work": "sampling", "directory": write_model(scratch, shape), "model": MODELS[shape], **BATCH}
        spec |= {"end_ids": never(shape), "slots": True}
        cases[shape] = against_peers(args, [ours("gcpo_jax", spec)], spec)
    return cases


def step(args: argparse.Namespace, scratch: pathlib.Path) -> dict[str, list[Contender]]:
    """One GRPO step on 4 x 8 rows: sample, reward, advantages, one AdamW update, with KL to a reference if beta > 0."""
    cases = {}
    for shape in args.shapes:
        spec = {"work": "step", "directory": write_model(scratch, shape), "model": MODELS[shape], **BATCH}
        spec |= {"end_ids": never(shape), "beta": args.beta, "preset": "grpo"}
        spec["changes"] = {"algorithm.beta": args.beta, "learner.micro_batch": 16, "rollout.max_rows": 32}
        spec["changes"]["model.remat"] = "dots"  # on a CPU faster than reading back all that was kept
        cases[f"{shape}, beta {args.beta:g}"] = against_peers(args, [ours("gcpo_jax", spec)], spec)
    return cases


def ragged(args: argparse.Namespace, scratch: pathlib.Path) -> dict[str, list[Contender]]:
    """256 completions of geometric length, mean a quarter of the limit, through 32 rows."""
    cases = {}
    for shape in args.shapes:
        spec = {"work": "sampling", "directory": write_model(scratch, shape), "model": MODELS[shape], **BATCH}
        # Random weights draw nearly uniformly: so many end ids end one token in new_tokens / 4.
        ends = round(MODELS[shape]["vocab_size"] * 4 / spec["new_tokens"])
        spec |= {"prompts": 256, "samples": 1, "end_ids": list(range(1, ends + 1))}
        mine = [ours("gcpo_jax", spec | {"slots": True}), ours("gcpo_jax, batches", spec | {"slots": False})]
        cases[shape] = against_peers(args, mine, spec)
    return cases


def shared(args: argparse.Namespace, scratch: pathlib.Path) -> dict[str, list[Contender]]:
    """2 prompts of 8 times the length of their 16 completions, computed once and computed 16 times.

    And of 2 queries the contexts of 8 left-out candidates.
    """
    cases = {}
    for shape in args.shapes:
        spec = {"directory": write_model(scratch, shape), "model": MODELS[shape], "end_ids": never(shape), "seed": 0}
        spec |= {"prompts": 2, "samples": 16, "prompt_tokens": 512, "new_tokens": 64}
        for part in args.parts:
            sizes = {"samples": 8, "prompt_tokens": 64} if part == "contexts" else {}
            one, each = (spec | sizes | {"work": part, "together": together} for together in (True, False))
            cases[f"{shape}, {part}"] = [ours("one copy", one), ours("a copy each", each)]
    return cases


def gcpo(args: argparse.Namespace, scratch: pathlib.Path) -> dict[str, list[Contender]]:
    """Steps of gcpo against grpo's: at the paper's proportions (also with two targets of KL'), and of two recipes."""
    cases = {}
    # The paper's proportions at a sixteenth of its lengths (T = 16384, S = 1024, M = 256, answers of 384, Q = 256).
    spec = {"work": "step", "directory": write_model(scratch, "small"), "model": MODELS["small"], **BATCH}
    spec |= {"prompt_tokens": 16, "new_tokens": 1024, "integrated_tokens": 64, "flat": True, "end_ids": never("small")}
    spec["changes"] = {"contexts.cap": 24, "learner.micro_batch": 8, "rollout.max_rows": 32}
    spec["changes"] |= {"learner.learning_rate": 0.0}
    works = {"paper's proportions": (spec, {"algorithm.rollout_tokens": 16})}
    recipe = {"work": "recipe", "rounds": args.rounds, "changes": {}}
    works["configs/tiny.py"] = (recipe | {"recipe": "tiny"}, {})
    if args.smollm2:
        works["configs/smollm2.py"] = (recipe | {"recipe": "smollm2", "changes": smollm2(args)}, {})
    for case, (spec, only_gcpo) in works.items():
        if case.split("'")[0].removeprefix("configs/").removesuffix(".py") in args.cases:
            cases[case] = [
                ours("grpo", spec | {"preset": "grpo"}),
                ours("gcpo", spec | {"preset": "gcpo", "changes": spec["changes"] | only_gcpo}),
            ]
            if only_gcpo:
                two = spec["changes"] | only_gcpo | {"algorithm.kl_targets": 2}
                cases[case].append(ours("gcpo, kl_targets=2", spec | {"preset": "gcpo", "changes": two}))
    return cases


def paper(args: argparse.Namespace, scratch: pathlib.Path) -> dict[str, list[Contender]]:
    """Steps of gcpo_paper, whole, and the same steps by the loop of tests/context_by_context.py."""
    spec = {"directory": write_model(scratch, args.shape), "model": MODELS[args.shape], "end_ids": never(args.shape)}
    spec |= BATCH | {"prompts": 1, "new_tokens": args.tokens, "preset": "gcpo_paper"}
    spec["changes"] = {"contexts.cap": args.tokens, "learner.micro_batch": 8, "rollout.max_rows": 128}
    spec["changes"] |= {"learner.learning_rate": 0.0}
    mine, loop = (ours(name, spec | {"work": work}) for name, work in (("gcpo_paper", "step"), ("the loop", "loop")))
    return {f"{args.shape}, {args.tokens} tokens": [mine, loop]}


def contexts(args: argparse.Namespace, scratch: pathlib.Path) -> dict[str, list[Contender]]:
    """Steps whose contexts' candidates do not see each other, and of those that do; candidates are quoted whole."""
    spec = {"work": "step", "directory": write_model(scratch, args.shape), "model": MODELS[args.shape], **BATCH}
    spec |= {"end_ids": never(args.shape), "prompts": 2}
    spec["changes"] = {"contexts.cap": 128, "learner.micro_batch": 16, "rollout.max_rows": 128}
    spec["changes"] |= {"learner.learning_rate": 0.0, "algorithm.rollout_tokens": 32}
    return {
        f"{args.shape}, {preset}": [
            ours(name, spec | {"preset": preset, "changes": spec["changes"] | {"contexts.attention": name}})
            for name in ("block", "causal")
        ]
        for preset in args.presets
    }


def roofline(args: argparse.Namespace, scratch: pathlib.Path) -> dict[str, list[Contender]]:
    """Decoding against memory bandwidth, the update against the matrix peak."""
    accelerator = jax.default_backend() != "cpu"
    shape, dtype = ("1.5b", "bfloat16") if accelerator else ("large", "float32")
    spec = {"model": MODELS[shape], "dtype": dtype, "seed": 0, "samples": 8}
    decode = spec | {"work": "decode", "prompts": args.rows // 8, "prompt_tokens": 512, "new_tokens": 256}
    sampled = decode | {k: BATCH[k] for k in ("prompts", "samples", "prompt_tokens", "new_tokens")}
    length = 4096 if accelerator else 512
    update = spec | {"work": "update", "prompts": 1, "prompt_tokens": 128, "new_tokens": length - 128}
    update["changes"] = {"algorithm.beta": 0.0, "learner.micro_batch": 8, "model.remat": "dots"}
    # One after the other: a process on a GPU takes most of its memory.
    works = {f"{dtype}, decode": decode, f"{dtype}, decode as in sampling": sampled, "update": update}
    return {f"{shape}, {name}": [ours("gcpo_jax", spec)] for name, spec in works.items()}


def compared(result: rounds_lib.Rounds, unit: str) -> dict[str, Any]:
    """Of each contender the spread of its rounds, how many times as fast the first one is, and every round."""
    measure = rounds_lib.rates if unit == "tokens/s" else rounds_lib.seconds
    values = {name: measure(rows) for name, rows in result.rows.items()}
    first = next(iter(values.values()))
    summary = {}
    for name, own in values.items():
        pair = (first, own) if unit == "tokens/s" else (own, first)
        summary[name] = {
            unit: rounds_lib.spread(own),
            "first_is_faster": rounds_lib.ratios(*pair),
            "versions": result.versions[name],
            "rounds": result.rows[name],
        }
    return summary


def table(results: dict[str, dict[str, Any]], unit: str) -> str:
    """Markdown: a line a contender, median and (least to greatest)."""
    lines = [f"| work | contender | {unit} | the first is faster by | notes |", "|" + " --- |" * 5]

    def cell(s: dict[str, float]) -> str:
        digits = max(0, 2 - math.floor(math.log10(max(s["median"], 1e-9))))
        return f"{s['median']:.{digits}f} ({s['min']:.{digits}f} to {s['max']:.{digits}f})"

    for work, contenders in results.items():
        for name, r in contenders.items():
            ratio = cell(r["first_is_faster"]) if "first_is_faster" in r else ""
            lines.append(f"| {work} | {name} | {cell(r[unit])} | {ratio} | {notes(r['rounds'])} |")
    return "\n".join(lines) + "\n"


def notes(rows: list[dict[str, Any]]) -> str:
    """What the rounds say beside time: phases, share of the peak, and compilations, which should be none."""
    said = []

    def median(value) -> float:
        return rounds_lib.spread([value(row) for row in rows])["median"]

    if "phases" in rows[0]:
        phases = [p for p in rows[0]["phases"] if all(p in row["phases"] for row in rows)]
        medians = {
            p[5:-2]: median(lambda row, p=p: row["phases"][p])
            for p in phases
            if p.endswith("_s") and p != "time/step_s"
        }
        said.append(", ".join(f"{phase} {value:.2f} s" for phase, value in medians.items()))
    if "of_peak" in rows[0]:
        said.append(f"{100 * median(lambda row: row['of_peak']):.0f} % of {rows[0]['peak']:.3g}/s")
    if "decode_tokens_per_s" in rows[0]:
        said.append(f"{median(lambda row: row['decode_tokens_per_s']):.0f} tokens/s in decoding")
    if "compiled" in rows[0]:
        said.append(f"{rows[-1]['compiled']} of {rows[-1]['programs']} programs compiled")
    if any(row.get("compilations") for row in rows):
        said.append(f"COMPILED {sum(row['compilations'] for row in rows)} programs while timed")
    return "; ".join(said)


def overlap(args: argparse.Namespace) -> dict[str, Any]:
    """Training runs that save often: what their steps wait for beside the devices' work."""
    results = {}
    for variant in args.variants:
        works: dict[str, dict[str, Any]] = {"tiny": {}}
        if args.smollm2:
            works["smollm2"] = smollm2(args)
        for recipe, changes in works.items():
            measured = waiting.measure(recipe, variant, changes, args.steps, args.every)
            results[f"configs/{recipe}.py:{variant}"] = measured
    return results


def smollm2(args: argparse.Namespace) -> dict[str, Any]:
    """What the recipe of that name leaves open."""
    train, held_out = args.data
    return {"model.path": args.smollm2, "data.path": train, "data.eval_path": held_out}


WORKS = {
    "sampling": (sampling, "tokens/s"),
    "step": (step, "seconds"),
    "ragged": (ragged, "tokens/s"),
    "shared": (shared, "seconds"),
    "gcpo": (gcpo, "seconds"),
    "paper": (paper, "seconds"),
    "contexts": (contexts, "seconds"),
    "roofline": (roofline, "tokens/s"),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subs = p.add_subparsers(dest="name", required=True)
    others = {"startup": startup.measure, "overlap": overlap}
    for name, function in {**{k: f for k, (f, _) in WORKS.items()}, **others}.items():
        sub = subs.add_parser(name, help=function.__doc__)
        if name != "overlap":
            sub.add_argument("--rounds", type=int, default=3 if name == "startup" else 5)
        sub.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "results" / f"benchmark_{name}.json")
        if name in ("sampling", "step", "ragged"):
            for peer in PEERS:
                sub.add_argument(f"--{peer}", metavar="PYTHON", help=f"the interpreter of an environment with {peer}")
        if name in ("sampling", "step", "ragged", "shared"):
            usual = ["small", "medium", "large"] if name in ("sampling", "step") else ["small"]
            sub.add_argument("--shapes", nargs="+", choices=list(MODELS), default=usual)
        if name == "step":
            sub.add_argument("--beta", type=float, default=0.0, help="weight of the KL to a reference; TRL's own is 0")
        if name == "shared":
            parts = ["prefill", "score", "gradient", "contexts"]
            sub.add_argument("--parts", nargs="+", default=parts, choices=parts)
        if name == "gcpo":
            sub.add_argument("--cases", nargs="+", default=["paper", "tiny", "smollm2"])
        if name == "overlap":
            sub.add_argument("--variants", nargs="+", choices=list(config_lib.PRESETS), default=["grpo", "gcpo"])
            sub.add_argument("--steps", type=int, default=40)
            sub.add_argument("--every", type=int, default=5, help="steps between checkpoints")
        if name in ("gcpo", "overlap"):
            sub.add_argument("--smollm2", metavar="DIR", help="a model directory; without it that case is left out")
            sub.add_argument("--data", nargs=2, metavar=("TRAIN", "HELD_OUT"), help="of scripts/word_problems.py")
        if name == "paper":
            sub.add_argument("--shape", choices=list(MODELS), default="small")
            sub.add_argument("--tokens", type=int, default=48, help="of candidates, integrated outputs and roll-outs")
        if name == "contexts":
            sub.add_argument("--shape", choices=list(MODELS), default="small")
            sub.add_argument("--presets", nargs="+", default=["gcpo", "gcpo_paper"])
        if name == "startup":
            sub.add_argument("--variant", default="gcpo")
        if name == "roofline":
            sub.add_argument("--rows", type=int, default=64, help="decoded at once")
    args = p.parse_args(argv)
    if args.name != "overlap" and args.rounds < 1:
        p.error(f"--rounds={args.rounds}: must be at least 1")
    if args.name in ("gcpo", "overlap") and args.smollm2 and not args.data:
        p.error("--smollm2 needs --data TRAIN HELD_OUT")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return what is written."""
    if args.name == "startup":
        rows = startup.measure(args.rounds, args.variant)
        unit, kinds = (
            "seconds",
            {k: {"seconds": rounds_lib.spread(rounds_lib.seconds(v)), "rounds": v} for k, v in rows.items()},
        )
        results: dict[str, Any] = {f"configs/tiny.py:{args.variant}": kinds}
        specs: dict[str, Any] = {}
    elif args.name == "overlap":
        results, specs, unit = overlap(args), {}, "per cent of a step"
        print(waiting.table(results))
    else:
        cases, unit = WORKS[args.name]
        with tempfile.TemporaryDirectory() as scratch:
            results, specs = {}, {}
            for work, contenders in cases(args, pathlib.Path(scratch)).items():
                results[work] = compared(rounds_lib.alternate(contenders, args.rounds), unit)
                specs[work] = {c.name: spec_of(c) for c in contenders}
                print(table({work: results[work]}, unit), flush=True)
    if args.name != "overlap":
        print(table(results, unit))
    made = provenance.made(f"python scripts/benchmark.py {args.name}" + options(args))
    return {**made, "device": jax.devices()[0].device_kind, "unit": unit, "works": specs, "results": results}


def spec_of(contender: Contender) -> dict[str, Any]:
    """The work in JSON, without where on this machine it lay and with the number of end ids only."""
    spec = {k: v for k, v in contender.spec.items() if k not in ("directory", "end_ids")}
    if "changes" in spec:
        spec["changes"] = {k: v for k, v in spec["changes"].items() if not k.endswith("path")}
    return spec | {"number_of_end_ids": len(contender.spec.get("end_ids", []))}


def options(args: argparse.Namespace) -> str:
    """The options as they would be typed, with placeholders for what is a place on this machine."""
    places = {"tunix": "PYTHON", "trl": "PYTHON", "smollm2": "DIR", "data": "TRAIN HELD_OUT"}
    typed = ""
    for name, value in vars(args).items():
        if name in ("name", "out") or value is None:
            continue
        words = places.get(name) or (shlex.join(value) if isinstance(value, list) else str(value))
        typed += f" --{name} {words}"
    return typed


def main() -> None:
    """Parse, measure, write."""
    args = parse(sys.argv[1:])
    record = run(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
