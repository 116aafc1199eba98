"""Grading: a committed set of pairs, every gold of the data, hostile texts, workers that die, order and speed."""

import gzip
import itertools
import json
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from gcpo_jax.evaluation import statistics
from gcpo_jax.grading import workers
from gcpo_jax.grading.workers import Pool
from gcpo_jax.tasks import math as grading

PAIRS = [
    json.loads(line) for line in (pathlib.Path(__file__).parent / "fixtures/grading.jsonl").read_text().splitlines()
]
DATA = pathlib.Path(os.environ.get("GCPO_DATA", pathlib.Path(__file__).resolve().parents[2] / "shared/data"))
FILES = sorted(path.name for path in DATA.glob("*.jsonl*") if not path.name.startswith(("humaneval", "mbpp")))
# Settled by math-verify only: one side is an integral, which this package does not read.
HARD = [(rf"\boxed{{\int_0^{{{k}}} x dx}}", rf"\frac{{{k * k + (k % 3 == 0)}}}{{2}}", k % 3 != 0) for k in range(1, 13)]

HANG = tuple(rf"\int_0^1 \frac{{\sin^{{{k}}}(x^3) e^{{x}}}}{{1+x^{{17}}}} dx" for k in (20, 21))  # takes minutes


def boxed(text: str) -> str:
    return rf"\boxed{{{text}}}"


def test_committed_pairs_agree_and_none_is_falsely_accepted():
    verdicts = grading.grade_all([p["completion"] for p in PAIRS], [p["gold"] for p in PAIRS])
    wrong = [p for p, v in zip(PAIRS, verdicts, strict=True) if v != p["correct"]]
    accepted = [p for p in wrong if not p["correct"]]
    assert len(wrong) <= 0.02 * len(PAIRS) and len(accepted) < 0.01 * len(PAIRS), wrong
    assert not wrong  # what is more than asked, and holds


def test_committed_pairs_are_many_and_of_every_file():
    golds = {p["gold"] for p in PAIRS}
    assert len(PAIRS) >= 300 and len(golds) > 150
    for gold in golds:
        verdicts = [p["correct"] for p in PAIRS if p["gold"] == gold]
        assert min(verdicts.count(True), verdicts.count(False)) >= 3, gold
    assert len({p["source"] for p in PAIRS}) >= 12


def rows_of(name: str) -> list[str]:
    path = DATA / name
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as lines:
        return sorted({json.loads(line)["answer"] for line in lines})


@pytest.mark.skipif(not FILES, reason="no data: set GCPO_DATA")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if "40k" in n else []) for n in FILES])
def test_every_gold_accepts_itself(name):
    golds = rows_of(name)
    verdicts = grading.grade_all([f"So ${boxed(gold)}$." for gold in golds], golds)
    assert [g for g, v in zip(golds, verdicts, strict=True) if not v] == []


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        ("The final answer is $x = 5$.", "x=5"),
        ("#### 1,234", "1234"),
        ("Answer: (C)", "(C)"),
        ("we add 3 and 4 to get 7 apples in total", "7"),
        ("<think>4</think> The answer is 5.", "5"),
        ("<think>The answer is 5.", None),
        (r"\boxed{5", None),
        (r"\boxed{4} or \boxed{5}", None),
        ("maybe 5", None),
        ("", None),
        ("no idea at all about this problem, sorry for that", None),
    ],
)
def test_the_final_answer_is_found(completion, found):
    assert grading.answer(completion) == found


def test_a_reward_takes_a_percentage_with_or_without_its_sign_only_where_one_is_asked_for():
    asked = {"answer": "60", "problem": "What percentage of them are red?"}
    other = {"answer": "60", "problem": "How many of them are red?"}
    rewards = [grading.reward("", "The answer is 60%.", row) for row in (asked, other)]
    assert rewards == [1.0, 0.0]
    assert grading.reward("", "The answer is 61%.", asked) == 0.0


MARKER = "gcpo_jax_grading_injection"
HOSTILE = [
    boxed("{" * 5000 + "5" + "}" * 5000),
    boxed(r"\frac{1}{" * 300 + "2" + "}" * 300),
    boxed("(" * 900 + "5" + ")" * 900),
    boxed("1" * 10**6),
    "a" * 10**6,
    "$" * 10**6,
    r"\boxed{" * 10**5,
    "the answer is " * 80_000,
    " " * 10**6,
    "1," * 10**5,
    "-" * 10**5,
    boxed("9**9**9"),
    boxed("9^{9^{9}}"),
    boxed("10^{10^{10}}"),
    boxed("100000!"),
    boxed("(((9!)!)!)"),
    boxed(r"\binom{10^9}{5\cdot10^8}"),
    boxed("1e999999999"),
    boxed("1/0"),
    boxed("\x005\x00 1"),
    boxed("\ud800 5"),
    boxed(r"\input{/etc/passwd}"),
    boxed("{{{}") + "}}}}",
    boxed("%s%n{0.__class__}"),
    boxed(rf"__import__('os').system('touch {MARKER}')"),
    boxed(rf"\text{{__import__('os').system('touch {MARKER}')}}"),
    boxed(rf"(lambda: open('{MARKER}', 'w'))()"),
    boxed(r"\int_0^{\infty} e^{-x^{x^{x}}} \sin(x^{100}) dx"),
    boxed(r"\sum_{n=1}^{10^9} \frac{1}{n^n}"),
    boxed(r"\prod_{n=1}^{1000000} n"),
    boxed(r"\lim_{x \to 0} \frac{\sin x^{x^x}}{x}"),
    boxed(r"\sqrt" * 500 + "2"),
    boxed(r"\pm" * 50 + "5"),
    boxed(r"\lfloor" * 100 + "5"),
    boxed("|" * 200),
    boxed(r"\text{" * 300 + "}" * 300),
    boxed(r"\begin{pmatrix}" + "&".join("1" * 900) + r"\end{pmatrix}"),
]


@pytest.mark.parametrize("completion", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_text_is_wrong_and_quickly_so(completion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grading.grade(*HARD[0][:2])  # starting the workers is not what is timed
    for gold in (r"\frac{1}{2}", r"\int_0^2 x dx"):
        began = time.process_time()  # of this process; what a worker may take is measured below
        assert grading.grade(completion, gold) is False
        assert grading.grade(boxed(gold), completion[:5000]) is False
        assert time.process_time() - began < 4, "two gradings"
    assert not list(tmp_path.iterdir()), "text was evaluated"


def test_a_thousand_answers_take_under_twenty_seconds():
    pairs = (PAIRS * 2)[:1000]
    began = time.process_time()  # the machine may be busy; the workers see under one in a hundred of these
    grading.grade_all([p["completion"] for p in pairs], [p["gold"] for p in pairs])
    assert time.process_time() - began < 10


def test_hard_answers_come_back_in_order():
    verdicts = grading.grade_all([h[0] for h in HARD], [h[1] for h in HARD])
    assert verdicts == [h[2] for h in HARD]


def test_a_worker_killed_in_the_middle_changes_nothing():
    grading.grade(*HARD[0][:2])
    done = threading.Event()

    def kill():
        for pid in grading._POOL.pids:
            os.kill(pid, 9)
        done.set()

    timer = threading.Timer(0.2, kill)
    timer.start()
    verdicts = grading.grade_all([h[0] for h in HARD], [h[1] for h in HARD])
    timer.join()
    assert done.is_set() and verdicts == [h[2] for h in HARD]


def test_a_question_that_hangs_costs_its_answer_only():
    pool = Pool(size=1, wall_s=3.0, cpu_s=0.5)
    hang = [*HANG, False]
    easy = [r"\frac{1}{2}", r"\int_0^1 x dx", False]
    try:
        assert pool.map([easy]) == [True]
        first, began = pool.pids, time.monotonic()
        assert pool.map([hang, easy]) == [workers.LIMIT, True]
        assert pool.pids == first and time.monotonic() - began < 2 * 3.0
    finally:
        pool.close()
    assert pool.pids == []


def test_an_answer_that_could_not_be_graded_is_wrong_and_says_why(monkeypatch, caplog):
    pool = Pool(size=1, wall_s=3.0, cpu_s=0.5)
    monkeypatch.setattr(grading, "_POOL", pool)
    hang = boxed(HANG[1]), HANG[0]
    try:
        with caplog.at_level(logging.WARNING):
            hung, right = grading.judge_all([hang[0], HARD[0][0]], [hang[1], HARD[0][1]])
        assert hung == (False, workers.LIMIT) and right == (True, None)
        assert f"1 of 2 answers could not be graded and count as wrong ({workers.LIMIT}: 1)" in caplog.text
        caplog.clear()
        ask = workers.Worker.ask

        def ask_and_kill(worker, question, limit_s):
            worker.kill()
            return ask(worker, question, limit_s)

        monkeypatch.setattr(workers.Worker, "ask", ask_and_kill)
        assert grading.judge_all([HARD[0][0]], [HARD[0][1]]) == [(False, workers.DIED)]
        assert f"({workers.DIED}: 1)" in caplog.text
    finally:
        pool.close()


# Spellings of one answer each, as the grader has it; the last of the first class is for the workers.
SPELLINGS = [
    [r"\frac{1}{2}", "0.5", r"\frac12", "2/4", "x = 1/2", r"50\%", r"\int_0^1 x dx"],
    ["1,234", "1234", r"1234\text{ cm}", "1.234e3"],
    [r"(1, \sqrt{4})", "(1,2)"],
    [r"\text{Tuesday}", "tuesday"],
]


@pytest.mark.parametrize("seed", range(6))
def test_votes_count_answers_that_the_grader_holds_equal_together(seed):
    rng = np.random.default_rng(seed)
    groups, classes = [], []
    for _ in range(4):
        drawn = rng.integers(-1, len(SPELLINGS), int(rng.integers(4, 9))).tolist()
        classes.append([None if c < 0 else str(c) for c in drawn])
        groups.append(["no idea" if c < 0 else boxed(str(rng.choice(SPELLINGS[c]))) for c in drawn])
    voted = grading.votes(groups, [{"problem": "How much?"}] * 4)
    for texts, names, right in zip(groups, voted, classes, strict=True):
        assert [a is None for a in names] == [c is None for c in right]
        for (a, c), (b, d) in itertools.combinations(zip(names, right, strict=True), 2):
            assert (a == b) == (c == d), (texts, names)
        scores = [float(c == "0") for c in right]
        for k in (1, 4):  # over all picks, by the classes
            picks = itertools.combinations(range(len(right)), k)
            expected = np.mean([statistics.majority([right[i] for i in p], [scores[i] for i in p]) for p in picks])
            assert statistics.majority_at_k(names, scores, k) == pytest.approx(expected, abs=1e-12)


def test_votes_are_named_by_the_first_spelling_and_of_each_problem_alone():
    groups = [[boxed(t) for t in ("0.5", "1/2", "3", r"\frac12")], [boxed("1/2"), "", boxed("0.5")]]
    assert grading.votes(groups, [{}, {}]) == [["0.5", "0.5", "3", "0.5"], ["1/2", None, "1/2"]]
    percent = [[boxed("60"), boxed(r"60\%")]] * 2
    rows = [{"problem": "What percentage?"}, {"problem": "How many?"}]
    assert [len(set(names)) for names in grading.votes(percent, rows)] == [1, 2]


def test_of_hostile_answers_few_are_asked_about_and_the_others_are_votes_of_their_own(monkeypatch):
    asked = []

    def hang(questions):
        asked.extend(questions)
        return [workers.LIMIT] * len(questions)

    monkeypatch.setattr(grading._POOL, "map", hang)
    hard = [boxed(HANG[0].replace("20", str(k))) for k in range(20, 40)]
    began = time.process_time()
    (names,) = grading.votes([hard + HOSTILE[::5]], [{}])
    assert len(names) == len(hard + HOSTILE[::5]) and len(set(names[: len(hard)])) == len(hard)
    assert len(asked) == 2 * grading.MAX_HARD_VOTES and time.process_time() - began < 10


def test_a_closed_pool_leaves_no_process():
    pool = Pool(size=1)
    assert pool.map([[r"\frac{1}{2}", r"\int_0^1 x dx", False]]) == [True]
    (pid,) = pool.pids
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_workers_import_neither_jax_nor_a_second_framework():
    for module, allowed in (("gcpo_jax.grading.workers", set()), ("gcpo_jax.grading.worker_main", {"sympy"})):
        heavy = f"{{'jax', 'sympy', 'torch', 'tensorflow'}} & set(sys.modules) - {allowed!r}"
        program = f"import sys, {module}; print({heavy} or 'none')"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "none"


def test_the_front_imports_no_sympy():
    program = "import sys, gcpo_jax.tasks.math; assert not {'sympy', 'torch', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
