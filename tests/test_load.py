"""Problems: read, checked, prepared and put in order."""

import errno
import gzip
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from gcpo_jax import config, tasks
from gcpo_jax.tasks import arithmetic, jsonl, load

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(os.environ.get("GCPO_DATA") or ROOT.parent / "shared" / "data")
ROWS = [{"id": f"p{k}", "problem": f"{k}+1=", "answer": str(k + 1), "level": k} for k in range(20)]


def write(path: pathlib.Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(tmp_path: pathlib.Path, **fields) -> config.Data:
    return config.Data(**({"directory": str(tmp_path / "cache"), "held_out": 5} | fields))


def prepared(tmp_path: pathlib.Path) -> set[str]:
    return {entry.name for entry in (tmp_path / "cache" / "jsonl").iterdir()}


def test_a_jsonl_file_is_split_and_every_field_of_a_row_is_kept(tmp_path):
    data = settings(tmp_path, path=write(tmp_path / "a.jsonl", ROWS))
    for _ in range(2):  # prepared, then read back
        task = tasks.build(data)
        assert (len(task.train), len(task.held_out)) == (15, 5)
        assert sorted([*task.train, *task.held_out], key=lambda r: r["level"]) == [r | {"original": r} for r in ROWS]
        levels = [row["level"] for row in task.train]
        assert levels == sorted(levels)


def test_gzip_gives_the_rows_of_the_plain_file(tmp_path):
    plain = write(tmp_path / "a.jsonl", ROWS)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(pathlib.Path(plain).read_bytes()))
    of_plain = tasks.build(settings(tmp_path, path=plain))
    assert tasks.build(settings(tmp_path, path=str(packed))) == of_plain


def test_a_held_out_file_is_used_whole(tmp_path):
    train, held_out = write(tmp_path / "a.jsonl", ROWS[:12]), write(tmp_path / "b.jsonl", ROWS[12:])
    task = tasks.build(settings(tmp_path, path=train, eval_path=held_out))
    assert [row["id"] for row in task.train] == [f"p{k}" for k in range(12)]
    assert [row["id"] for row in task.held_out] == [f"p{k}" for k in range(12, 20)]


def test_other_field_names_numbers_as_answers_and_missing_ids_become_text(tmp_path):
    rows = [{"question": f"q{k}", "gold": k / 2, "answer": "a worked solution"} for k in range(6)]
    path = write(tmp_path / "a.jsonl", rows)
    task = tasks.build(settings(tmp_path, path=path, problem_field="question", answer_field="gold", held_out=1))
    row = next(row for row in [*task.train, *task.held_out] if row["question"] == "q3")
    said = {"id": "LINE-4", "problem": "q3", "answer": "1.5", "question": "q3", "gold": 1.5}
    assert row == said | {"original": rows[3]}


def test_a_changed_file_or_setting_is_prepared_anew_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    data = settings(tmp_path, path=write(path, ROWS))
    tasks.build(data)
    first = prepared(tmp_path)
    stamp = path.stat()
    write(path, [row | {"answer": "7"} for row in ROWS[:1]] + ROWS[1:])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time, another answer
    task = tasks.build(data)
    assert {row["answer"] for row in [*task.train, *task.held_out] if row["id"] == "p0"} == {"7"}
    assert len(prepared(tmp_path) - first) == 1
    tasks.build(settings(tmp_path, path=str(path), held_out=6))
    tasks.build(settings(tmp_path, path=str(path), answer_field="id"))
    assert len(prepared(tmp_path)) == 4
    monkeypatch.setattr(load, "_prepare", lambda *_: pytest.fail("prepared a second time"))
    assert tasks.build(data) == task


def test_the_split_ignores_order_and_keeps_copies_of_a_problem_out_of_the_held_out_rows(tmp_path):
    twice = [{"problem": row["problem"], "answer": "?"} for row in ROWS[::2]]
    task = tasks.build(settings(tmp_path, path=write(tmp_path / "a.jsonl", ROWS + twice)))
    held_out = {row["problem"] for row in task.held_out}
    assert len(task.held_out) == 5 and not held_out & {row["problem"] for row in task.train}
    backwards = tasks.build(settings(tmp_path, path=write(tmp_path / "b.jsonl", (ROWS + twice)[::-1])))
    assert {row["problem"] for row in backwards.held_out} == held_out


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_taken(tmp_path):
    lines = [json.dumps(row, ensure_ascii=False) for row in [{"problem": "a\u2028b", "answer": "1"}, ROWS[1], ROWS[2]]]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b"\n\n")
    rows = jsonl.parse((tmp_path / "a.jsonl").read_bytes(), "a", "problem", "answer")
    assert [(row["id"], row["problem"]) for row in rows] == [("LINE-1", "a\u2028b"), ("p1", "1+1="), ("p2", "2+1=")]


WRONG = {
    b"{broken": "not JSON",
    b'{"problem": "p", "answer": NaN}': "not JSON: NaN",
    b"[1, 2]": r"a JSON object is needed, not \[1, 2\]",
    b'{"answer": "1", "q": 2}': "no field 'problem' .set data.problem_field.; it has 'answer', 'q'",
    b'{"problem": "p"}': "no field 'answer' .set data.answer_field.",
    b'{"problem": 3, "answer": "1"}': "field 'problem' must be a string, not 3",
    b'{"problem": null, "answer": "1"}': "field 'problem' must be a string, not null",
    b'{"problem": " ", "answer": "1"}': "field 'problem' is empty",
    b'{"problem": "p\\u0000", "answer": "1"}': "field 'problem' holds a NUL",
    b'{"problem": "p\\ud800", "answer": "1"}': "field 'problem' holds half of a surrogate pair",
    b'{"problem": "p", "answer": ""}': "field 'answer' is empty",
    b'{"problem": "p", "answer": true}': "field 'answer' must be a string or a finite number, not true",
    b'{"problem": "p", "answer": [1]}': r"field 'answer' must be a string or a finite number, not \[1\]",
    b'{"problem": "p", "answer": 1e999}': "field 'answer' must be a string or a finite number",
    b'{"problem": "p", "answer": "1", "id": [1]}': r"field 'id' must be a string or an integer, not \[1\]",
    b'{"problem": "\xff", "answer": "1"}': "not UTF-8: invalid start byte at byte 13",
    b"[" * 100_000: "not JSON",
    b'{"problem": "p", "answer": ' + b"1" * 5000 + b"}": "not JSON",
}


@pytest.mark.parametrize("line", WRONG, ids=lambda line: line[:40].decode(errors="replace"))
def test_a_wrong_line_is_named_by_file_and_number(tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"problem": "p", "answer": "1"}\n\n' + line + b"\n")
    with pytest.raises(tasks.DataError, match=r"mine\.jsonl, line 3: " + WRONG[line]):
        tasks.build(settings(tmp_path, path=str(path)))
    assert not (tmp_path / "cache").exists()


def test_files_that_cannot_be_used_are_named(tmp_path):
    def error(name: str, content: bytes, **fields) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(tasks.DataError) as caught:
            tasks.build(settings(tmp_path, path=str(tmp_path / name), **fields))
        return str(caught.value)

    good = b'{"problem": "p", "answer": "1"}\n'
    assert "empty.jsonl: has no rows" in error("empty.jsonl", b"\n \n")
    assert "Not a gzipped file" in error("plain.jsonl.gz", good)
    assert "cannot be read" in error("short.jsonl.gz", gzip.compress(good * 50)[:-12])
    assert "none would be left to train on" in error("few.jsonl", good * 3, held_out=3)
    assert "only 0 problems" in error("same.jsonl", good * 3, held_out=1)
    evaluation = write(tmp_path / "evaluation.jsonl", [ROWS[0], "text"])
    assert "evaluation.jsonl, line 2: a JSON object is needed" in error("fine.jsonl", good, eval_path=evaluation)
    with pytest.raises(tasks.DataError, match=r"data.path='.*': cannot be read: .*Is a directory"):
        tasks.build(settings(tmp_path, path=str(tmp_path)))


def test_a_cache_that_cannot_be_written_names_data_directory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    data = config.Data(path=write(tmp_path / "a.jsonl", ROWS), held_out=5, directory=str(tmp_path / "file" / "cache"))
    with pytest.raises(
        tasks.DataError, match=r"data.directory='.*file/cache'.*name a directory that can be written to"
    ):
        tasks.build(data)


def test_a_read_only_cache_is_refused_for_new_data_and_read_for_prepared_data(tmp_path, monkeypatch):
    data = settings(tmp_path, path=write(tmp_path / "a.jsonl", ROWS))
    tasks.build(data)

    def refuse(**_):  # what a read-only directory does, to root too
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(load.tempfile, "mkdtemp", refuse)
    assert len(tasks.build(data).train) == 15
    with pytest.raises(tasks.DataError, match=r"data\.directory=.*Permission denied"):
        tasks.build(settings(tmp_path, path=str(tmp_path / "a.jsonl"), held_out=6))


def test_a_damaged_prepared_file_is_refused_by_name(tmp_path):
    data = settings(tmp_path, path=write(tmp_path / "a.jsonl", ROWS))
    tasks.build(data)
    (records,) = (tmp_path / "cache").glob("jsonl/*/*-train.array_record-*")
    content = bytearray(records.read_bytes())
    content[200] ^= 1  # in the compressed rows; most of so small a file is padding
    records.write_bytes(content)
    with pytest.raises(tasks.DataError, match=r"cannot be read .*delete it"):
        tasks.build(data)


def test_the_cache_directory_is_the_setting_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert load.cache_directory() == tmp_path / ".cache" / "gcpo_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert load.cache_directory() == tmp_path / "x" / "gcpo_jax"
    assert load.cache_directory("~/mine") == tmp_path / "mine"


def test_processes_that_prepare_the_same_data_at_once_all_get_it(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS * 50 + [{"problem": "once", "answer": "1"}])
    code = (
        "import sys\nfrom gcpo_jax import config, tasks\n"
        f"t = tasks.build(config.Data(path={path!r}, held_out=1, directory={str(tmp_path / 'cache')!r}))\n"
        "assert (len(t.train), len(t.held_out)) == (1000, 1)\n"
        "loaded = {'tensorflow', 'torch'} & set(sys.modules)\nassert not loaded, loaded\n"
    )
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert len(prepared(tmp_path)) == 1  # nothing incomplete is left behind


def test_the_loser_of_a_race_uses_what_the_winner_wrote(tmp_path, monkeypatch):
    data = settings(tmp_path, path=write(tmp_path / "a.jsonl", ROWS))
    task = tasks.build(data)
    before = prepared(tmp_path)
    monkeypatch.setattr(pathlib.Path, "exists", lambda self: False)  # as it looked before the winner's rename
    assert tasks.build(data) == task
    assert prepared(tmp_path) == before


def test_the_arithmetic_task_is_prepared_with_its_held_out_rows(tmp_path):
    task = tasks.build(settings(tmp_path, task="arithmetic"))
    assert (list(task.train), list(task.held_out)) == arithmetic.problems()
    assert len(task.held_out) == 1024


def test_importing_the_tasks_does_not_import_tensorflow_datasets():
    code = "import sys, gcpo_jax.tasks; assert not {'tensorflow_datasets', 'tensorflow', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@hypothesis.given(size=st.integers(1, 60), queries=st.integers(1, 20), seed=st.integers(0, 2**31), data=st.data())
@hypothesis.settings(max_examples=25, deadline=None)
def test_every_epoch_has_each_problem_once_however_batches_straddle_it(size, queries, seed, data):
    steps = -(-3 * size // queries)
    order = [k for step in range(steps) for k in tasks.batch_indices(size, queries, step, seed)]
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    step = data.draw(st.integers(0, steps - 1))  # one integer is enough to go on from
    assert tasks.batch_indices(size, queries, step, seed) == order[step * queries : (step + 1) * queries]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(tasks.batch_indices(50, 50, epoch, seed)) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25


FILES = [
    ("aime24.jsonl", 30),
    ("aime25.jsonl", 30),
    ("aime_1983_2023_919.jsonl", 919),
    ("aime_1983_2023_975.jsonl", 975),
    ("amc23.jsonl", 40),
    ("amc_2022_2023.jsonl", 83),
    ("deepscaler_40k.jsonl.gz", 40308),
    ("gsm8k_test.jsonl", 1319),
    ("gsm8k_train.jsonl.gz", 7473),
    ("math500.jsonl", 500),
    ("math_train.jsonl.gz", 7470),
    ("minerva_math.jsonl", 272),
    ("numinamath_4k.jsonl", 4000),
]


@pytest.mark.skipif(not DATA.is_dir(), reason="no directory of real problems: set GCPO_DATA")
@pytest.mark.parametrize(("name", "count"), FILES)
def test_real_files_load_whole(tmp_path, name, count):
    task = tasks.build(settings(tmp_path, path=str(DATA / name)))
    assert (len(task.train), len(task.held_out)) == (count - 5, 5)
    assert all(row["original"]["problem"] == row["problem"] for row in task.train)


@pytest.mark.skipif(not DATA.is_dir(), reason="no directory of real problems: set GCPO_DATA")
def test_forty_thousand_rows_are_checked_within_seconds():
    began = time.process_time()
    content = jsonl.read(DATA / "deepscaler_40k.jsonl.gz", "data.path")
    jsonl.split(jsonl.parse(content, "x", "problem", "answer"), 64, "x")
    assert time.process_time() - began < 10  # 1.4 s on an idle machine


def test_word_problems_are_right_and_no_held_out_fact_is_trained_on():
    spec = importlib.util.spec_from_file_location("word_problems", ROOT / "scripts" / "word_problems.py")
    words = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(words)
    train, held_out = words.split(held_out=True)
    assert (len(train), len(held_out)) == (540, 184) and (train, held_out) == words.split(held_out=True)
    everything, none = words.split(held_out=False)
    assert len({row["problem"] for row in everything}) == len(everything) == 724 and not none

    def fact(row):
        kind, a, b, _ = row["id"].split("-")
        assert int(row["answer"]) == (int(a) + int(b) if kind == "sum" else int(a) * int(b))
        assert row["problem"].index(words.WORDS[int(a)]) <= row["problem"].rindex(words.WORDS[int(b)])
        return kind, *sorted([a, b])

    assert not {fact(row) for row in train} & {fact(row) for row in held_out}
