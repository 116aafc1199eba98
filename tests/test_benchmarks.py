import gzip
import json
import os
import pathlib

import pytest

from gcpo_jax.tasks import DataError, benchmarks

DATA = pathlib.Path(os.environ.get("GCPO_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))
ANSWER = {"problem": "1+1=", "answer": 2, "level": 3}
FUNCTION = {"id": "H/1", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f): assert f(1) == 1"}
TASK = {"id": 7, "prompt": "Double it.", "test_list": ["assert f(1) == 2"], "split": "test"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_users_file_is_read_in_each_form(tmp_path):
    loaded = [
        benchmarks.load(write(tmp_path / f"{k}.jsonl", row), "") for k, row in enumerate((ANSWER, FUNCTION, TASK))
    ]
    assert [b.form for b in loaded] == ["answer", "humaneval", "mbpp"]
    assert [b.title for b in loaded] == ["0", "1", "2"]
    assert list(loaded[0].rows) == [{"problem": "1+1=", "answer": "2", "level": 3, "id": "LINE-1"}]
    assert loaded[2].rows[0]["id"] == "7"


def test_a_packed_file_is_read_too_and_a_changed_one_is_read_anew(tmp_path):
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(ANSWER) + "\n\n").encode()))
    before = benchmarks.load(str(path), "")
    assert before.title == "mine" and before.rows[0]["answer"] == "2"
    path.write_bytes(gzip.compress((json.dumps(ANSWER | {"answer": "3"}) + "\n").encode()))
    after = benchmarks.load(str(path), "")
    assert after.rows[0]["answer"] == "3" and after.digest != before.digest


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"question": "?"}],
            "line 1: a row has problem and answer, or prompt and entry_point and test, or prompt and",
        ),
        ([ANSWER, {"problem": "2"}], "line 2: no field 'answer', which the first row has"),
        ([ANSWER, ANSWER | {"answer": True}], "line 2: field 'answer' must be text, not true"),
        ([ANSWER | {"problem": " "}], "line 1: field 'problem' must be text"),
        ([TASK | {"test_list": []}], "line 1: field 'test_list' must be a list of assert statements"),
        ([[1]], "line 1: a JSON object is needed"),
        ([], "has no rows"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, rows, said):
    path = write(tmp_path / "mine.jsonl", *rows)
    with pytest.raises(DataError, match=r"mine\.jsonl") as error:
        benchmarks.load(path, "")
    assert said in str(error.value)


def test_unknown_names_and_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"benchmarks=.aime.: must be one of aime24, aime25, .*or the path of"):
        benchmarks.load("aime", str(tmp_path))
    with pytest.raises(DataError, match=r"aime24.jsonl does not exist; --data names the directory"):
        benchmarks.load("aime24", str(tmp_path))
    with pytest.raises(DataError, match=r"nothing.jsonl does not exist$"):
        benchmarks.load(str(tmp_path / "nothing.jsonl"), "")


def test_shots_and_splits_come_from_mbpp(tmp_path):
    examples = [TASK | {"id": k, "split": "prompt" if k < 7 else "test"} for k in range(9)]
    write(tmp_path / "mbpp.jsonl", *examples)
    write(tmp_path / "humaneval.jsonl", FUNCTION)
    assert [row["id"] for row in benchmarks.load("mbpp", str(tmp_path)).rows] == ["7", "8"]
    five, none = (benchmarks.load(name, str(tmp_path)) for name in ("humaneval_5shot", "humaneval"))
    assert [row["id"] for row in five.shots] == ["0", "1", "2", "3", "4"] and none.shots == []
    assert five.digest != none.digest and list(five.rows) == list(none.rows)
    write(tmp_path / "mbpp.jsonl", *examples[:3])
    with pytest.raises(DataError, match="has only 3 rows whose split is 'prompt'; 5 are needed"):
        benchmarks.load("humaneval_5shot", str(tmp_path))


def test_a_larger_limit_keeps_what_a_smaller_one_chose_in_any_order_of_the_file():
    rows = [{"problem": str(k), "id": str(k)} for k in range(50)]
    chosen = {limit: benchmarks.subset(rows, limit) for limit in (0, 5, 20, 99)}
    assert chosen[0] == chosen[99] == list(range(50))
    assert len(chosen[5]) == 5 and set(chosen[5]) < set(chosen[20]) and chosen[20] == sorted(chosen[20])
    turned = rows[::-1]
    assert {turned[k]["id"] for k in benchmarks.subset(turned, 5)} == {rows[k]["id"] for k in chosen[5]}


SIZES = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "minerva_math": 272, "gsm8k": 1319, "humaneval": 164,
         "humaneval_5shot": 164, "mbpp": 500, "arithmetic": 1024}  # fmt: skip


@pytest.mark.parametrize("name", benchmarks.NAMED)
def test_every_named_benchmark_is_whole(name):
    if name != "arithmetic" and not (DATA / benchmarks.NAMED[name].file).exists():
        pytest.skip(f"no {benchmarks.NAMED[name].file} in {DATA} (GCPO_DATA names another directory)")
    benchmark = benchmarks.load(name, str(DATA))
    assert len(benchmark.rows) == SIZES[name] == len({row["id"] for row in benchmark.rows})
    assert len(benchmark.shots) == benchmarks.NAMED[name].shots
