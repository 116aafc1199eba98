"""Settings: presets, validation messages, overrides on the command line."""

import dataclasses
import importlib
import pathlib
import subprocess
import sys

import pytest

from gcpo_jax import config as config_lib
from gcpo_jax.evaluation import settings

RECIPES = sorted(p for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py") if p.stem != "__init__")
CONFIGS = [p for p in RECIPES if not p.stem.startswith("eval_")]


def valid(**changes) -> config_lib.Config:
    config = config_lib.Config(
        model=config_lib.Model(path="model"), data=config_lib.Data(path="data.jsonl"), algorithm=config_lib.preset(None)
    )
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


@pytest.mark.parametrize("name", config_lib.PRESETS)
def test_every_preset_is_valid(name):
    config = valid()
    config.algorithm = config_lib.preset(name)
    config_lib.validate(config)


@pytest.mark.parametrize(
    ("change", "value", "words"),
    [
        ("contexts__attention", "tree", "contexts.attention='tree': must be one of causal, block"),
        ("rollout__group_size", 1, "rollout.group_size=1: must be at least 2"),
        ("rollout__temperature", 0.0, "rollout.temperature=0.0: must be above 0"),
        ("rollout__top_p", 1.5, "rollout.top_p=1.5: must be at most 1"),
        ("learner__learning_rate", float("nan"), "learner.learning_rate=nan: must be a finite number"),
        ("algorithm__similarity", "cos", "algorithm.similarity='cos': must be one of cosine, euclidean, gaussian"),
        ("algorithm__integrated", 1, "algorithm.integrated=1: must be 0 (all) or between 2 and 8"),
        ("algorithm__kl_targets", 9, "algorithm.kl_targets=9: must be at most rollout.group_size=8"),
        ("train__total_steps", 0, "train.total_steps=0: must be at least 1"),
        ("train__audit_steps", (100,), "train.audit_steps=[100]: must be in [0, train.total_steps)"),
        ("model__path", "", "model.path='': must name"),
        ("data__path", "", "data.path='': must name"),
        ("data__prompt", "solve it", "data.prompt='solve it': must contain {problem}"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(change, value, words):
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.validate(valid(**{change: value}))
    assert words in str(error.value)


def test_all_faults_are_told_at_once():
    with pytest.raises(config_lib.ConfigError, match=r"(?s)rollout\.queries.*rollout\.group_size"):
        config_lib.validate(valid(rollout__queries=0, rollout__group_size=1))


def test_unknown_variant_lists_the_known_ones():
    with pytest.raises(config_lib.ConfigError, match="unknown variant 'ppo'; known: grpo, dr_grpo"):
        config_lib.preset("ppo")


def test_bounds_name_existing_fields():
    names = set(config_lib.flatten(valid()))
    for table in (config_lib._CHOICES, config_lib._AT_LEAST, config_lib._ABOVE, config_lib._AT_MOST, config_lib._BELOW):
        assert set(table) <= names


def test_missing_files_are_named(tmp_path):
    with pytest.raises(config_lib.ConfigError, match=r"model\.path=.*config\.json does not exist"):
        config_lib.check_paths(valid(model__path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(config_lib.ConfigError, match=r"data\.path="):
        config_lib.check_paths(valid(model__path=str(tmp_path), data__path=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("variant", [None, *config_lib.PRESETS])
def test_every_recipe_has_every_preset(file, variant):
    namespace = {"__file__": str(file), "__name__": file.stem}
    exec(compile(file.read_text(), file, "exec"), namespace)
    config = namespace["get_config"](variant)
    assert config.algorithm == config_lib.preset(variant)
    config.model.path = config.model.path or "model"
    config.data.path = config.data.path or "data.jsonl"
    config_lib.validate(config)


@pytest.mark.parametrize("name", ["eval_paper", "eval_tiny"])
def test_recipes_of_an_evaluation_are_valid_and_have_no_variants(name):
    recipe = importlib.import_module(f"gcpo_jax.configs.{name}")
    config = recipe.get_config()
    settings.validate(config, needs_model=name == "eval_tiny")
    with pytest.raises(config_lib.ConfigError, match=f"configs/{name}.py has no variant 'gcpo'"):
        recipe.get_config("gcpo")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.learner.learning_rat=1", "learning_rat"),
        ("--config.rollout.queries=many", "many"),
        ("--config.rollout.group_size=1", "rollout.group_size=1: must be at least 2"),
        ("--config.model.path=/nowhere/at/all", "model.path='/nowhere/at/all'"),
    ],
)
def test_overrides_that_cannot_be_are_refused(tmp_path, override, words):
    result = subprocess.run(
        [sys.executable, "-m", "gcpo_jax.train", f"--workdir={tmp_path / 'run'}", override],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert result.returncode != 0
    assert words in result.stderr
    assert "Traceback" not in result.stderr.split("error:")[-1] if "error:" in result.stderr else True
    assert not (tmp_path / "run").exists()


def test_fields_are_typed_without_postponed_annotations():
    for section in dataclasses.fields(config_lib.Config):
        assert isinstance(section.type, type)


def test_contexts_in_blocks_are_refused_where_something_reads_them_as_causal():
    config = valid(contexts__attention="block", train__audit_steps=(0,))
    with pytest.raises(config_lib.ConfigError, match=r"train.audit_steps=\[0\]: must be empty with contexts.attention"):
        config_lib.validate(config)
    evaluation = settings.EvalConfig()
    evaluation.contexts.attention, evaluation.input.form = "block", "projected"
    with pytest.raises(config_lib.ConfigError, match=r"contexts.attention='block': must be causal with"):
        settings.validate(evaluation, needs_model=False)
