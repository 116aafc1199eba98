"""One-digit sums and times tables asked in words, as a JSONL file of problems.

    python scripts/word_problems.py words.jsonl                   # everything: 724 rows
    python scripts/word_problems.py words.jsonl words_eval.jsonl  # a quarter of the facts apart

With one file, data.held_out splits off rows whose wording is new, while their sum may be trained on in other words.
With two (data.path and data.eval_path), no sum or product of the second stands in the first, in any wording or order.
Made for SmolLM2-135M-Instruct through its chat template; see configs/smollm2.py.
"""

import argparse
import json
import pathlib
import random

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SUMS = ["What is {} plus {}?", "How much is {} plus {}?", "What is the sum of {} and {}?", "Add {} and {}."]
PRODUCTS = [
    "What is {} times {}?",
    "How much is {} times {}?",
    "What is the product of {} and {}?",
    "What is {} multiplied by {}?",
]


def facts() -> dict[tuple[str, int, int], list[dict[str, str]]]:
    """Rows by (operation, smaller, larger): 0 to 9 for sums, 1 to 9 for products, both orders, every wording."""
    found: dict[tuple[str, int, int], list[dict[str, str]]] = {}
    for kind, lowest, wordings in (("sum", 0, SUMS), ("product", 1, PRODUCTS)):
        for a in range(lowest, 10):
            for b in range(lowest, 10):
                rows = found.setdefault((kind, min(a, b), max(a, b)), [])
                for k, wording in enumerate(wordings):
                    problem = wording.format(WORDS[a], WORDS[b])
                    result = a + b if kind == "sum" else a * b
                    rows.append({"id": f"{kind}-{a}-{b}-{k}", "problem": problem, "answer": str(result)})
    return found


def split(held_out: bool) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held-out) rows; a quarter of the facts is held out, or none. The same at every call."""
    groups = list(facts().values())
    random.Random(7).shuffle(groups)
    border = len(groups) // 4 if held_out else 0
    return [row for rows in groups[border:] for row in rows], [row for rows in groups[:border] for row in rows]


def write(path: pathlib.Path, rows: list[dict[str, str]]) -> None:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} problems")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="One-digit sums and times tables asked in words, as JSONL.")
    parser.add_argument("out", type=pathlib.Path, help="the file to write")
    parser.add_argument("held_out", type=pathlib.Path, nargs="?", help="a second file, for a quarter of the facts")
    args = parser.parse_args()
    train, held_out = split(held_out=args.held_out is not None)
    write(args.out, train)
    if args.held_out is not None:
        write(args.held_out, held_out)


if __name__ == "__main__":
    main()
