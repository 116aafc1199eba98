"""What the policy is shown, the projected input, code problems, and every named benchmark."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import micro_model
import numpy as np
import pytest

from gcpo_jax import contexts, evaluate, models, sampler
from gcpo_jax.config import ConfigError, Contexts
from gcpo_jax.evaluation import forms, grades, projected, prompts, store
from gcpo_jax.evaluation.settings import EvalConfig, Input, Policy, Prompts, Sampling
from gcpo_jax.tasks import benchmarks, code

DATA = pathlib.Path(os.environ.get("GCPO_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))
FUNCTION = {
    "id": "H/1",
    "prompt": 'def f(x):\n    """Twice x."""\n',
    "entry_point": "f",
    "test": "def check(f):\n    assert f(2) == 4",
}
TASK = {"id": "1", "prompt": "Write a function to double.", "test_list": ["assert g(1) == 2", "assert g(2) == 4"]}
SHOT = TASK | {"canonical_solution": "def g(x):\r\n\treturn 2 * x", "split": "prompt"}
SUM = {"id": "s", "problem": "What is 1 plus 1?", "answer": "2"}


def benchmark(form, *rows, shots=()):
    return benchmarks.Benchmark("b", "B", form, list(rows), list(shots), "")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = micro_model.write(tmp_path_factory.mktemp("forms") / "model", chat=True)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 32768}))
    return path


@pytest.fixture(scope="module")
def styles(model):
    """A builder of contexts for each style that the tokenizer can do."""
    eos = models.read_config(model).eos_ids
    return {s: contexts.build(str(model), Contexts(style=s, cap=8), "{problem}", eos) for s in ("chat", "base")}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shown(styles, style, asked, row):
    return styles[style].tokenizer.decode(prompts.query(styles[style], asked, row, Prompts()))


def test_a_question_is_asked_in_the_template_or_the_base_models_frame(styles):
    asked = benchmark("answer", SUM)
    text = "What is 1 plus 1?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert shown(styles, "chat", asked, SUM) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert shown(styles, "base", asked, SUM) == f"Problem: {text}\n\nAttempt:\n"


def test_a_base_model_goes_on_writing_the_program(styles):
    assert shown(styles, "base", benchmark("humaneval", FUNCTION), FUNCTION) == FUNCTION["prompt"]
    assert shown(styles, "base", benchmark("mbpp", TASK), TASK) == (
        '"""\nWrite a function to double.\nassert g(1) == 2\n"""\n'
    )


def test_a_chat_model_sees_the_function_or_the_task_with_its_tests(styles):
    said = shown(styles, "chat", benchmark("humaneval", FUNCTION), FUNCTION)
    assert f"```python\n{FUNCTION['prompt'].rstrip()}\n```" in said and FUNCTION["test"] not in said
    said = shown(styles, "chat", benchmark("mbpp", TASK), TASK)
    assert "Write a function to double." in said and "assert g(1) == 2\nassert g(2) == 4" in said


def test_shots_stand_before_the_problem_solved(styles):
    asked = benchmark("humaneval", FUNCTION, shots=[SHOT] * 5)
    base, chat = (shown(styles, style, asked, FUNCTION) for style in ("base", "chat"))
    assert base.endswith(f"\n\n\n{FUNCTION['prompt']}") and base.count("def g(x):\n    return 2 * x\n") == 5
    compile(base + "    return 2 * x\n", "prompt", "exec")
    assert chat.count("```python\ndef g(x):\n    return 2 * x\n```") == 5
    assert chat.index("Now solve this one.") > chat.rindex("def g") and chat.count("def f") == 1


def test_only_a_base_models_next_problem_is_cut_off():
    text = "So it is \\boxed{2}.\n\nProblem: What is 3 plus 4?\n\nAttempt:\n\\boxed{7}"
    assert prompts.ended(text, "answer", "base") == "So it is \\boxed{2}."
    assert prompts.ended(text, "answer", "chat") == text and prompts.ended(text, "mbpp", "base") == text
    right = grades.grade(benchmark("answer", SUM), [0], [text], "base", "tasks.math.reward", False)
    assert right == [{"correct": True, "answer": "2", "reason": None}]


def test_votes_are_of_one_problem_and_name_an_answer_by_its_first_spelling():
    asked = benchmark("answer", SUM | {"answer": "0.5"}, SUM | {"problem": "How many?", "answer": "3"})
    texts = [f"\\boxed{{{t}}}" for t in ("1/2", "0.5", r"\frac12", "0.5", "3")]
    judged = grades.grade(asked, [0, 1, 0, 0, 1], texts, "chat", "tasks.math.reward", False)
    assert [(g["correct"], g["answer"]) for g in judged] == [
        (True, "1/2"), (False, "0.5"), (True, "1/2"), (True, "1/2"), (True, "3")
    ]  # fmt: skip


def test_programs_are_judged_from_chat_and_from_raw_continuations():
    if missing := code.available():
        pytest.skip(f"no sandbox here: {missing}")
    chat = "Sure:\n```python\ndef f(x):\n    return 2 * x\n```"
    raw = "    return x + x\n\n\ndef h():\n    return broken("
    given = [chat, raw, "    return x\n", ""]
    judged = grades.grade(benchmark("humaneval", FUNCTION), [0] * 4, given, "base", "", False)
    assert [g["correct"] for g in judged] == [True, True, False, False]
    assert judged[2]["reason"] == "failed" and judged[0]["answer"] is None
    given = ["def g(x):\n    return 2 * x", "```python\ndef g(x):\n    return 2\n```"]
    judged = grades.grade(benchmark("mbpp", TASK), [0] * 2, given, "chat", "", False)
    assert [g["correct"] for g in judged] == [True, False]


def test_without_a_sandbox_code_is_refused_before_anything_is_sampled(monkeypatch):
    monkeypatch.setattr(code, "available", lambda: ["user namespaces"])
    with pytest.raises(code.SandboxUnavailable, match="user namespaces"):
        grades.check([benchmark("answer", SUM), benchmark("mbpp", TASK)], unsafe=False)
    grades.check([benchmark("mbpp", TASK)], unsafe=True)
    grades.check([benchmark("answer", SUM)], unsafe=False)


def test_the_mixture_is_the_projection_made_a_distribution():
    p = jnp.asarray([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]], jnp.float32)  # q, x_0, x_1
    # x - (x_0 + x_1) / 2 + q = 0.3, 0.5, 0.2: a distribution as it is.
    np.testing.assert_allclose(projected.mixture(p), [0.3, 0.5, 0.2], atol=1e-6)
    p = jnp.asarray([[0.1, 0.3, 0.6], [0.0, 1.0, 0.0], [0.8, 0.2, 0.0]], jnp.float32)
    # -0.3, 0.7, 0.6
    np.testing.assert_allclose(projected.mixture(p), [0.0, 7 / 13, 6 / 13], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_all_contexts_are_the_query_the_projected_input_is_the_query(model, temperature):
    model_config, params = models.load_pretrained(model)
    asked = [[5, 6, 7, 8], [9, 10, 11]]
    settings = dict(key=jax.random.key(0), max_new_tokens=8, temperature=temperature, top_k=0, top_p=1.0, max_rows=8)
    groups = [[ids] * 3 for ids in asked]
    drawn = projected.sample(model_config, params, groups, index=[4, 7], **settings)
    if temperature == 0:
        greedy = sampler.sample(model_config, params, asked, n=1, eos_ids=model_config.eos_ids, **settings)
        assert drawn == [group[0] for group in greedy.tokens]
    # The number of a group decides its draws, not its place or what is beside it.
    assert projected.sample(model_config, params, groups[1:], index=[7], **settings) == drawn[1:]
    if temperature:
        other = projected.sample(model_config, params, groups, index=[5, 7], **settings)
        assert other[0] != drawn[0] and other[1] == drawn[1]


@pytest.fixture
def policy(model, styles):
    """policy(form): one that notes which contexts it was shown."""
    model_config, params = models.load_pretrained(model)
    config = EvalConfig(
        model=Policy(path=str(model), dtype="float32"),
        sampling=Sampling(samples=4, max_new_tokens=4, max_rows=8, temperature=1.0, top_p=1.0),
        contexts=Contexts(cap=8),
    )
    return lambda form: forms.Policy(
        dataclasses.replace(config, input=Input(form=form, candidates=3)), model_config, params, styles["chat"]
    )


@pytest.mark.parametrize(("form", "integrated"), [("x", 1), ("projected", 2)])
def test_a_context_leaves_one_candidate_out_and_has_the_integrated_outputs(policy, monkeypatch, form, integrated):
    seen, asked = [], policy(form)
    builder = type(asked.contexts)

    def leave_one_out(self, problem, others, output):
        seen.append((tuple(map(tuple, others)), tuple(output)))
        return self.query(problem)

    monkeypatch.setattr(builder, "leave_one_out", leave_one_out)
    rows = [SUM, SUM | {"problem": "What is 2 plus 2?"}]
    drawn = forms.sample(asked, benchmark("answer", *rows), [0, 1], jax.random.key(0))
    assert [len(group) for group in drawn] == [4, 4] and all(len(ids) <= 4 for group in drawn for ids in group)
    assert len(seen) == 2 * 4 * integrated
    first = seen[: 4 * integrated]
    everything = {c for others, _ in first for c in others}
    left_out = [everything - set(others) for others, _ in first[::integrated]]
    assert len(everything) == 3 and [len(c) for c in left_out] == [1] * 4
    assert left_out[0] == left_out[3] and len(set.union(*left_out[:3])) == 3
    assert len({output for _, output in first}) == integrated
    again = forms.sample(asked, benchmark("answer", *rows), [1], jax.random.key(0))
    assert again == drawn[1:]


def test_a_context_past_the_models_positions_is_refused(policy):
    asked = policy("x")
    asked.config.sampling.max_new_tokens = 51
    forms.check_length(asked.config, dataclasses.replace(asked.model_config, max_position=60), [[1], [2] * 9])
    with pytest.raises(ConfigError, match=r"=51: .* past the model's 60 positions; at most 50 would do"):
        forms.check_length(asked.config, dataclasses.replace(asked.model_config, max_position=60), [[1], [2] * 10])


NAMES = [name for name in benchmarks.NAMED if name != "arithmetic"]


@pytest.mark.slow  # two minutes: a program is compiled for every length of prompt
@pytest.mark.parametrize("style", ["chat", "base"])
@pytest.mark.parametrize("form", ["q", "x", "projected"])
def test_every_named_benchmark_runs_from_file_to_table(model, tmp_path, style, form):
    if not (DATA / "aime24.jsonl").exists():
        pytest.skip(f"no files in {DATA} (GCPO_DATA names another directory)")
    if missing := code.available():
        pytest.skip(f"no sandbox here: {missing}")
    config = EvalConfig(
        benchmarks=",".join(NAMES if form == "q" else ["amc23", "humaneval_5shot"]),
        data=str(DATA),
        limit=1,
        model=Policy(path=str(model), dtype="float32"),
        input=Input(form=form, candidates=2),
        sampling=Sampling(samples=4, max_new_tokens=4, max_rows=8),
        contexts=Contexts(style=style, cap=4),
    )
    lines = evaluate.evaluate(config, tmp_path / "w", lambda text: None)
    assert [line.name for line in lines] == config.benchmarks.split(",")
    assert ("mean of the five" in (tmp_path / "w" / "table.md").read_text()) == (form == "q")
    assert len(store.read(tmp_path / "w" / "completions.jsonl")) == 4 * len(lines)


def test_a_named_benchmark_runs_from_file_to_table(model, tmp_path):
    if not (DATA / "amc23.jsonl").exists():
        pytest.skip(f"no amc23.jsonl in {DATA} (GCPO_DATA names another directory)")
    config = EvalConfig(
        benchmarks="amc23",
        data=str(DATA),
        limit=1,
        model=Policy(path=str(model), dtype="float32"),
        sampling=Sampling(samples=1, max_new_tokens=4, max_rows=8),
    )
    (line,) = evaluate.evaluate(config, tmp_path / "w", lambda text: None)
    assert (line.title, len(line.ids), line.majority) == ("AMC 2023", 1, None)
