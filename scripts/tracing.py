"""What scripts/profile.py does: trace some steps of a recipe, and print where their time went.

DIR/plugins/profile/DATE/ then has *.trace.json.gz, which ui.perfetto.dev opens, and *.xplane.pb, for `xprof DIR` or
TensorBoard. Each phase of a step (sample, integrate, contexts, score, update) is a span on the Python thread's line.
"""

import argparse
import collections
import contextlib
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from gcpo_jax import config as config_lib
from gcpo_jax import metrics, train

sys.path.append(str(pathlib.Path(__file__).resolve().parent / "peers"))
import steps


class Span(NamedTuple):
    """Something that took time on one line of a trace; times in nanoseconds."""

    name: str
    start: float
    length: float


class Spans(metrics.Timers):
    """Timers whose phases are seen in a trace."""

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """As its parent."""
        with jax.profiler.TraceAnnotation(phase), super().__call__(phase):
            yield


def own_times(spans: Iterable[Span]) -> dict[str, tuple[float, int]]:
    """{name: (nanoseconds without what ran inside, how often)} of the spans of one line, which nest or follow.

    A loop lasts as long as all that its body does; without this it would be the longest operation of every trace.
    """
    total: dict[str, tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    open_spans: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.length)):
        while open_spans and open_spans[-1].start + open_spans[-1].length <= span.start:
            open_spans.pop()
        if open_spans:
            own, count = total[open_spans[-1].name]
            total[open_spans[-1].name] = (own - span.length, count)
        own, count = total[span.name]
        total[span.name] = (own + span.length, count + 1)
        open_spans.append(span)
    return dict(total)


def operations(path: pathlib.Path) -> dict[str, tuple[float, int]]:
    """{"program: operation": (nanoseconds, how often)} of an *.xplane.pb, over all threads and devices."""
    total: dict[str, tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            spans = []
            for event in line.events:
                told = dict(event.stats)
                if "hlo_op" not in told:
                    continue
                # Copies of one instruction have numbers of their own; what they are is the name before.
                kind = re.sub(r"[.\d]+$", "", str(told["hlo_op"]))
                spans.append(Span(f"{told.get('hlo_module', '?')}: {kind}", event.start_ns, event.duration_ns))
            for name, (own, count) in own_times(spans).items():
                total[name] = (total[name][0] + own, total[name][1] + count)
    return dict(total)


def table(times: dict[str, tuple[float, int]], rows: int = 10) -> str:
    """Markdown, longest first; shares are of all operations together."""
    everything = sum(own for own, _ in times.values())
    lines = ["| operation | own time, ms | share | times |", "|" + " --- |" * 4]
    for name, (own, count) in sorted(times.items(), key=lambda item: -item[1][0])[:rows]:
        lines.append(f"| `{name}` | {own / 1e6:.1f} | {100 * own / everything:.1f} % | {count} |")
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", default="tiny", help="a file of configs/, without .py")
    p.add_argument("--preset", default="gcpo", choices=list(config_lib.PRESETS))
    p.add_argument("--model", help="a model directory, where the recipe names none")
    p.add_argument("--data", nargs=2, metavar=("TRAIN", "HELD_OUT"), help="JSONL files, where the recipe names none")
    p.add_argument("--steps", type=int, default=2, help="traced; the same ones are made before, untraced")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("trace"), help="a directory")
    return p.parse_args(argv)


def main() -> None:
    """Compile, trace, print."""
    args = parse(sys.argv[1:])
    train.cache_compilations()
    changes: dict[str, Any] = {"model.path": args.model} if args.model else {}
    if args.data:
        changes |= {"data.path": args.data[0], "data.eval_path": args.data[1]}
    work = steps.recipe({"recipe": args.recipe, "preset": args.preset, "changes": changes}, Spans)
    for number in range(args.steps):
        work(number)
    with jax.profiler.trace(str(args.out)):
        rows = [work(number) for number in range(args.steps)]
    for row in rows:
        print(", ".join(f"{name[5:-2]} {value:.2f} s" for name, value in row["phases"].items()))
    written = max(args.out.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    print(f"\n{table(operations(written))}\n{written.parent}")
