"""From a problem to what the policy is shown, and where a base model's answer ends.

A chat model gets one user turn. A base model gets the frame of contexts.py for a question, and for a program the text
of a Python file to go on with: HumanEval's prompt as it is, MBPP's task and tests as a docstring. Examples ("shots")
stand before it: in the turn as tasks with their programs, in the file as finished functions.
"""

from gcpo_jax.contexts import ContextBuilder, Ids
from gcpo_jax.evaluation.settings import Prompts
from gcpo_jax.tasks.benchmarks import Benchmark
from gcpo_jax.tasks.jsonl import Row

# A base model that has answered goes on with another problem, in the frame that it was shown.
_BASE_ENDS = ("\n\nProblem:", "\n\nAttempt")


def turn(benchmark: Benchmark, row: Row, prompts: Prompts) -> str:
    """The user's turn: what is asked and in which form it is to be answered."""
    if benchmark.form == "answer":
        return prompts.answer.replace("{problem}", row["problem"])
    asked = _task(benchmark.form, row)
    if benchmark.shots:
        solved = "\n\n".join(f"{_task('mbpp', shot)}\n\n{_fenced(_code(shot))}" for shot in benchmark.shots)
        asked = f"Solved examples:\n\n{solved}\n\nNow solve this one.\n\n{asked}"
    return prompts.code.replace("{problem}", asked)


def query(contexts: ContextBuilder, benchmark: Benchmark, row: Row, prompts: Prompts) -> Ids:
    """The prompt of the input form q."""
    if benchmark.form == "answer" or contexts.style != "base":
        return contexts.query(turn(benchmark, row, prompts))
    finished = "".join(f"{_docstring(shot)}{_code(shot)}\n\n\n" for shot in benchmark.shots)
    return contexts.raw(finished + (row["prompt"] if benchmark.form == "humaneval" else _docstring(row)))


def ended(completion: str, form: str, style: str) -> str:
    """A completion without what a base model wrote after its answer; of a program tasks/code.py finds the end."""
    if style != "base" or form != "answer":
        return completion
    return completion[: min((at for end in _BASE_ENDS if (at := completion.find(end)) >= 0), default=len(completion))]


def _task(form: str, row: Row) -> str:
    if form == "humaneval":
        return f"Complete this Python function:\n\n{_fenced(row['prompt'])}"
    tests = "\n".join(row["test_list"])
    return f"{row['prompt'].strip()}\n\nThe program must pass these tests:\n\n{_fenced(tests)}"


def _docstring(row: Row) -> str:
    # One test shows the name of the function; base models are commonly shown no more (InCoder, 2204.05999).
    return f'"""\n{row["prompt"].strip()}\n{row["test_list"][0]}\n"""\n'


def _fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def _code(shot: Row) -> str:
    return shot["canonical_solution"].replace("\r\n", "\n").replace("\t", "    ").rstrip()
