"""Bad input given to the real command: one clear line, exit code 1, no device touched, nothing left behind."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import micro_model
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(os.environ.get("GCPO_DATA") or ROOT.parent / "shared" / "data")
SMOLLM2 = os.environ.get("GCPO_SMOLLM2", "")
RECIPE = "configs/tiny.py"
SIZES = {
    "data.task": "jsonl", "data.held_out": 4, "rollout.queries": 2, "rollout.group_size": 4,
    "rollout.max_new_tokens": 8, "learner.micro_batch": 4, "evaluation.problems": 2, "evaluation.samples": 1,
    "checkpoint.every": 1, "train.total_steps": 2,
}  # fmt: skip
ROWS = [{"id": f"p{k}", "problem": f"{k}+1=", "answer": str(k + 1)} for k in range(12)]


def write_rows(path: pathlib.Path, rows) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command_on(platform: str, directory: pathlib.Path):
    """run(config=..., workdir=..., **{"section.field": value}) -> (exit code, what it said); the process behind it."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": platform, "XDG_CACHE_HOME": str(directory / "cache"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "forked.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    settings = SIZES | {"model.path": directory / "tiny", "data.path": directory / "problems.jsonl"}

    def run(*more: str, config: str = f"{RECIPE}:grpo", workdir: str = "run", **changes) -> tuple[int, str]:
        if not pathlib.Path(config.partition(":")[0]).is_absolute() and config.startswith("configs/"):
            config = str(ROOT / config)
        argv = [f"--config={config}", f"--workdir={workdir}"]
        argv += [f"--config.{name}={value}" for name, value in (settings | changes).items()]
        process.stdin.write(json.dumps({"argv": [*argv, *more], "cwd": str(directory)}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        return answer["code"], answer["said"]

    return run, process


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Two random models, twelve problems, and room for what a test breaks."""
    path = tmp_path_factory.mktemp("bad")
    micro_model.write(path / "tiny", chat=False)
    micro_model.write(path / "chat", chat=True)
    write_rows(path / "problems.jsonl", ROWS)
    return path


@pytest.fixture(scope="module")
def command(directory):
    """The command where no device can be had: whoever asks for one fails, and not in one clear line."""
    run, process = command_on("nonsense", directory)
    with process:
        yield run
        process.stdin.close()


@pytest.fixture
def broken(directory, tmp_path):
    """A copy of the tiny model to break."""
    return pathlib.Path(shutil.copytree(directory / "tiny", tmp_path / "model"))


def change(file: pathlib.Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def refused(command, directory):
    """refused(words..., changes): the command says one line with all the words and leaves no run directory."""

    def check(*words: str, more: tuple[str, ...] = (), **changes) -> None:
        code, said = command(*more, **changes)
        lines = said.splitlines()
        assert code == 1 and len(lines) == 1 and lines[0].startswith("error: "), said
        assert [word for word in words if word not in said] == [], said
        assert not (directory / "run").exists()

    return check


def test_good_input_gets_as_far_as_the_device(command, directory):
    code, said = command()
    assert code == 1 and "Unable to initialize backend 'nonsense'" in said and "Traceback" in said
    shutil.rmtree(directory / "run")


def test_a_model_directory_that_is_not_there_is_named(refused):
    refused("model.path='nowhere'", "config.json does not exist", **{"model.path": "nowhere"})


def test_an_architecture_that_is_not_known_is_named_with_those_that_are(refused, broken):
    change(broken / "config.json", model_type="gemma")
    refused("config.json", "model_type='gemma' is not one of qwen2, qwen3, llama", **{"model.path": broken})


def test_rope_scaling_is_refused_by_name(refused, broken):
    change(broken / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    refused("rope scaling of type 'yarn'", **{"model.path": broken})


def test_weights_that_are_missing_or_cut_off_are_named(refused, broken):
    weights = broken / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    refused("model.safetensors cannot be read", **{"model.path": broken})
    weights.unlink()
    refused(f"{broken} holds no *.safetensors file", **{"model.path": broken})
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "one.safetensors"}}')
    refused("names files that do not exist: one.safetensors", **{"model.path": broken})


def test_weights_of_another_shape_are_named_without_a_device(refused, broken):
    change(broken / "config.json", intermediate_size=48)
    refused("model.layers.0.mlp.gate_proj.weight has shape [64, 32], not [48, 32]", **{"model.path": broken})


def test_a_model_without_an_end_id_is_refused(refused, broken):
    (broken / "generation_config.json").unlink()
    change(broken / "config.json", eos_token_id=None)
    refused("eos_token_id", **{"model.path": broken})


def test_a_tokenizer_that_is_missing_or_damaged_is_refused(refused, broken):
    (broken / "tokenizer.json").write_text("{}")
    refused("no tokenizer can be read there", **{"model.path": broken})
    (broken / "tokenizer.json").unlink()
    refused("no tokenizer can be read there", "is tokenizer.json there?", **{"model.path": broken})
    (broken / "tokenizer_config.json").unlink()
    refused("no tokenizer can be read there", "is tokenizer.json there?", **{"model.path": broken})


def test_a_tokenizer_of_another_model_is_refused(refused, broken, directory):
    shutil.copy(directory / "chat" / "tokenizer.json", broken)
    refused("its tokenizer writes id", "vocab_size=26", **{"model.path": broken, "contexts.style": "base"})


def test_a_context_style_that_the_tokenizer_cannot_do_is_refused(refused, directory):
    refused("contexts.style='tiny': the tokenizer lacks <q>", **{"model.path": "chat", "contexts.style": "tiny"})
    refused("contexts.style='chat': the tokenizer has no chat template", **{"contexts.style": "chat"})


def test_a_wrong_line_is_named_by_file_and_number(refused, tmp_path):
    path = write_rows(tmp_path / "mine.jsonl", ROWS[:2])
    path.write_text(path.read_text() + '{"problem": "1+1=", "anwser": "2"}\n')
    refused(f"{path}, line 3: no field 'answer' (set data.answer_field)", **{"data.path": path})
    path.write_text(path.read_text().replace('{"problem"', '{problem"'))
    refused(f"{path}, line 3: not JSON", **{"data.path": path})


def test_data_that_is_empty_missing_or_too_little_is_named(refused, tmp_path):
    path = write_rows(tmp_path / "empty.jsonl", [])
    refused(f"{path}: has no rows", **{"data.path": path})
    refused("data.path='none.jsonl'", "does not exist", **{"data.path": "none.jsonl"})
    refused("data.held_out=12", "none would be left to train on", **{"data.held_out": 12})


def test_a_training_problem_that_is_an_evaluation_problem_is_refused(refused, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", [ROWS[3] | {"problem": " 3 +1 ="}])
    refused("1 training problems stand in the held-out problems too ('p3' is 'p3')", "data.overlap=allow",
            **{"data.eval_path": held_out})  # fmt: skip
    refused(f"1 training problems stand in {held_out} too", **{"evaluation.benchmarks": held_out, "data.held_out": 2})
    refused("evaluation.benchmarks='none.jsonl'", "does not exist", **{"evaluation.benchmarks": "none.jsonl"})
    refused("data.overlap='maybe': must be one of refuse, allow", **{"data.overlap": "maybe"})


def test_prompts_that_are_too_long_are_refused_where_asked_or_where_none_is_left(refused):
    short = {"rollout.max_prompt_tokens": 5}
    refused("problem 'p0' has 6 prompt tokens", "max_prompt_tokens=5", **short, **{"data.too_long": "refuse"})
    refused("none of 8 problems fits rollout.max_prompt_tokens=5", **short)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("rollout.group_size", 1, "rollout.group_size=1: must be at least 2"),
        ("rollout.group_sise", 4, "rollout.group_sise: there is no such field; the nearest is rollout.group_size"),
        ("rolout.queries", 4, "--config.rolout.queries: there is no such field"),
        ("rollout.queries", "many", "--config.rollout.queries=many: invalid literal for int()"),
        ("rollout.queries", "2.5", "--config.rollout.queries=2.5: invalid literal for int()"),
        ("model.dtype", "float16", "model.dtype='float16': must be one of float32, bfloat16"),
        ("model.attention", "flash", "model.attention='flash': must be one of auto, plain, cudnn, splash"),
        ("model.attention", "cudnn", "model.dtype='float32': must be bfloat16 with model.attention=cudnn"),
        ("train.audit_steps", "first", "train.audit_steps=['first']: must be whole numbers"),
        ("data.reward", "tasks.nothing.reward", "data.reward='tasks.nothing.reward': module gcpo_jax.tasks.nothing"),
        ("data.reward", "tasks.math.nothing", "data.reward='tasks.math.nothing': gcpo_jax.tasks.math has no function"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_named_with_what_is_allowed(refused, name, value, words):
    refused(words, **{name: value})


def test_a_reward_module_that_fails_on_import_is_named_with_its_failure(refused, directory):
    (directory / "failing.py").write_text("1 / 0\n")
    refused("data.reward='failing.reward'", "ZeroDivisionError: division by zero", **{"data.reward": "failing.reward"})


def test_a_recipe_that_cannot_be_used_is_named(refused, directory):
    refused("unknown variant 'ppo'; known: grpo, dr_grpo", config=f"{RECIPE}:ppo")
    refused("--config='none.py:grpo': there is no such file", config="none.py:grpo")
    (directory / "words.py").write_text(
        "from gcpo_jax import config\n\n\ndef get_config(variant=None):\n"
        "    return config.Config(rollout=config.Rollout(top_k='all', temperature=None))\n"
    )
    refused(
        "rollout.temperature=None: must be of type float; rollout.top_k='all': must be of type int", config="words.py"
    )
    (directory / "mapping.py").write_text("def get_config(variant=None):\n    return {'train': {}}\n")
    refused("--config='mapping.py': get_config() must return a gcpo_jax.config.Config, not dict", config="mapping.py")


def test_a_recipes_own_mistake_keeps_its_traceback(command, directory):
    (directory / "mistaken.py").write_text("def get_config(variant=None):\n    return {}['nothing']\n")
    code, said = command(config="mistaken.py")
    assert code == 1 and "return {}['nothing']" in said and "KeyError: 'nothing'" in said
    assert not (directory / "run").exists()


def test_a_word_that_is_no_flag_is_refused(refused):
    refused("unexpected arguments: more", more=("more",))
    refused("Unknown command line flag 'wrokdir'", more=("--wrokdir=x",))


def test_a_directory_that_holds_another_run_or_something_else_is_left_as_it_is(command, directory):
    workdir = directory / "before"
    assert "Unable to initialize" in command(workdir=str(workdir))[1]
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    code, said = command(workdir=str(workdir), **{"rollout.queries": 3})
    assert code == 1 and "rollout.queries was 2, is 3" in said and "Traceback" not in said
    after = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    assert {k: v for k, v in after.items() if k != "lock"} == {k: v for k, v in before.items() if k != "lock"}
    code, said = command(workdir=".")
    assert code == 1 and "is not a run" in said and "Traceback" not in said


def test_a_reward_that_fails_in_mid_run_names_the_row_and_leaves_a_run_that_goes_on(directory):
    run, process = command_on("cpu", directory)
    text = "import os\n\nLOG = 'run/metrics.jsonl'\n\n\ndef reward(prompt, completion, row):\n    return {}\n"
    changes = {"data.reward": "mine.reward", "rollout.max_prompt_tokens": 6, "data.path": "mixed.jsonl"}
    write_rows(directory / "mixed.jsonl", [*ROWS, {"id": "long", "problem": "1+1+1+1=", "answer": "4"}])
    # The rewards of the first update are fine, and those of the second are not.
    fails = "{} if os.path.exists(LOG) and '\"step\": 1,' in open(LOG).read() else len(completion)"
    with process:
        for failure, words in (("1 / 0", "raised ZeroDivisionError"), ("float('nan')", "the reward is nan")):
            (directory / "mine.py").write_text(text.format(fails.format(failure)))
            code, said = run(**changes)
            last = said.splitlines()[-1]
            assert code == 1 and "Traceback" not in said, said
            assert last.startswith("error: ") and words in last and "row 'p" in last, said
            assert (directory / "run" / "checkpoints" / "1").is_dir()
            assert not (directory / "run" / "policy").exists()
            # Dropped problems are counted, and named.
            assert sum(map(int, re.findall(r"\((\d) over 6 prompt tokens left out: ", said))) == 3 and "long" in said, (
                said
            )
        (directory / "mine.py").write_text(text.format("len(completion)"))
        code, said = run(**changes)
        assert code == 0 and "from step 1" in said and (directory / "run" / "policy").is_dir(), said
        process.stdin.close()
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not DATA.is_dir(), reason="no directory of real problems: set GCPO_DATA")
@pytest.mark.skipif(not SMOLLM2, reason="no SmolLM2 directory: set GCPO_SMOLLM2")
@pytest.mark.parametrize(
    ("name", "reward"), [("aime24.jsonl", "tasks.math.reward"), ("gsm8k_train.jsonl.gz", "digits.reward")]
)
def test_real_problems_and_a_real_model_run_end_to_end(tmp_path, name, reward):
    # That model's answers are all wrong: digits let groups differ, so that the contexts are of real text too.
    (tmp_path / "digits.py").write_text(
        "def reward(p, completion, row):\n    return sum(map(str.isdigit, completion))\n"
    )
    settings = SIZES | {
        "model.path": SMOLLM2, "data.path": DATA / name, "data.reward": reward, "contexts.cap": 8,
        "rollout.group_size": 3, "rollout.max_prompt_tokens": 512, "rollout.max_new_tokens": 8,
        "algorithm.rollout_tokens": 4, "learner.micro_batch": 3, "checkpoint.every": 2,
    }  # fmt: skip
    argv = [f"--config.{name}={value}" for name, value in settings.items()]
    recipe = ROOT / "configs" / "smollm2.py"
    result = subprocess.run(
        [sys.executable, "-m", "gcpo_jax.train", f"--config={recipe}:gcpo", "--workdir=run", *argv],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["sampler_logprob_gap"] < 1e-3 for row in rows[1:])
    assert reward.startswith("tasks") or any(row["upsilon/mean"] is not None for row in rows[1:])
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "run")  # 2 GB
