"""The pages say what is true: their commands run, their paths, fields, presets and metrics exist."""

import importlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import micro_model
import pytest

from gcpo_jax import config, summary
from gcpo_jax.evaluation import settings
from gcpo_jax.tasks import code

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("README.md"), *(ROOT / "docs").rglob("*.md")])
FILES = ("json", "jsonl", "py")  # what follows the dot in a file's name
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)
FIELDS = set(config.flatten(config.Config())) | set(config.flatten(settings.EvalConfig()))
SECTIONS = {name.partition(".")[0] for name in FIELDS}
MODULES = {path.stem for path in (ROOT / "gcpo_jax").glob("*.py")}


def exists(section: str, name: str) -> bool:
    """Whether `section.name` is a setting, or what a module of that name defines."""
    module = importlib.import_module(f"gcpo_jax.{section}") if section in MODULES else None
    return f"{section}.{name}" in FIELDS or hasattr(module, name)


@pytest.fixture
def run_page(tmp_path):
    """run_page(name): every block of a page but plain text, in order, in an empty directory; returns what was said."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {
        "MODEL": str(micro_model.write(tmp_path / "model", chat=True)),
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    work = tmp_path / "work"
    work.mkdir()
    (work / "configs").symlink_to(ROOT / "configs")

    def run_page(page):
        said = ""
        for language, name, text in BLOCK.findall((ROOT / "docs" / page).read_text()):
            if language == "text":
                continue
            assert language in ("json", "python", "bash") and (language == "bash") != bool(name), (language, name)
            if name:
                (work / name).write_text(text)
                continue
            if "ask.py" in text and not importlib.util.find_spec("torch"):
                continue  # transformers needs torch to run a model; the library does not
            if "tasks.code" in text and code.available():
                continue  # no sandbox here; test_reward_workers.py sees that the command then says so
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text], cwd=work, env=environment, capture_output=True, text=True
            )
            assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
            said += result.stdout + result.stderr
        return said

    return run_page


def test_every_block_of_the_page_for_ones_own_data_runs_in_order(run_page):
    said = run_page("your_own.md")
    # What a reader is told to see: the reward, the style, both evaluations, a group, the end.
    for words in ("1.0\n", "style chat; 4 problems", "step 0/2", "step 2/2", "'scaled_advantage'", "from step 2"):
        assert words in said, f"{words!r} not in\n{said}"


@pytest.mark.slow  # six commands, each of which starts and compiles
def test_every_block_of_the_page_about_evaluation_runs_in_order(run_page):
    said = run_page("evaluate.md")
    for words in ("| Arithmetic | 64 ", "| sums ", "B - A, paired", "new tokens, at most", " left\n"):
        assert words in said, f"{words!r} not in\n{said}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    prose = re.sub(r"\]\([^)]*\)|https?://\S+", " ", text)
    named = set(re.findall(r"(?<![\w./-])(?:configs|docs|gcpo_jax|models|scripts|tests|\.ci)/[\w./-]*[\w/]", prose))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_functions_and_presets_that_are_named_exist(page):
    text = page.read_text()
    assert set(re.findall(r"--config\.([\w.]+\w)", text)) - FIELDS == set()
    named = {
        (a, b) for a, b in re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", text) if a in SECTIONS | MODULES and b not in FILES
    }
    assert [f"{a}.{b}" for a, b in sorted(named) if not exists(a, b)] == []
    presets = set(re.findall(r"\.py:([a-z]\w*)", text)) | set(re.findall(r"`(gcpo_[a-z]+)`", text)) - {"gcpo_jax"}
    assert presets - set(config.PRESETS) == set()


def test_every_metric_is_explained_and_no_other():
    text = (ROOT / "docs" / "your_own.md").read_text()
    assert [name for name in summary.NAMES if f"`{name}`" not in text] == []
    named = set(re.findall(r"`((?:reward|upsilon|projected|completion_length|time|majority|integrated)/\w+)`", text))
    assert named - set(summary.NAMES) == set()


def test_every_preset_is_explained():
    for page in ("your_own.md", "method.md"):
        text = (ROOT / "docs" / page).read_text()
        assert [name for name in config.PRESETS if f"`{name}`" not in text] == [], page
