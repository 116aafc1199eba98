"""scripts/benchmark.py without its peers, and the arithmetic of scripts/rounds.py and scripts/tracing.py."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "peers"))


def test_a_ratio_is_the_median_of_the_rounds_own_ratios(scripts):
    import rounds

    # The machine is ten times slower in the second round, for both: the ratio does not see it.
    ours = [{"tokens": 100, "seconds": s} for s in (1.0, 10.0, 1.0)]
    theirs = [{"tokens": 100, "seconds": s} for s in (2.0, 20.0, 3.0)]
    assert rounds.rates(ours) == [100, 10, 100]
    assert rounds.ratios(rounds.rates(ours), rounds.rates(theirs)) == pytest.approx({"median": 2, "min": 2, "max": 3})
    assert rounds.spread([3, 1, 2, 10]) == {"median": 2.5, "min": 1, "max": 10}


def test_the_first_is_faster_by_the_same_factor_in_seconds_and_in_tokens(scripts):
    import benchmark
    import rounds

    rows = {"a": [{"tokens": 6, "seconds": 2.0}], "b": [{"tokens": 6, "seconds": 5.0}]}
    result = rounds.Rounds(rows, {"a": {}, "b": {}})
    for unit in ("seconds", "tokens/s"):
        assert benchmark.compared(result, unit)["b"]["first_is_faster"]["median"] == pytest.approx(2.5)


def test_what_ran_inside_an_operation_is_not_its_own_time(scripts):
    import tracing

    loop, first, second, after = (
        tracing.Span("while", 0, 10),
        tracing.Span("dot", 1, 4),
        tracing.Span("dot", 5, 3),
        tracing.Span("copy", 10, 2),
    )
    assert tracing.own_times([after, second, first, loop]) == {"while": (3, 1), "dot": (7, 2), "copy": (2, 1)}


def test_every_contender_gets_the_same_prompts_of_the_asked_length(scripts):
    import worker

    spec = {"seed": 1, "prompts": 3, "prompt_tokens": 9, "model": {"vocab_size": 20}}
    ids = worker.prompt_ids(spec)
    assert [len(row) for row in ids] == [9, 9, 9] and ids == worker.prompt_ids(spec)
    assert all(row[0] == 16 and row[-1] == 19 and 0 not in row for row in ids)
    assert worker.even_share("2 4 5 <y> 6") == 0.75 and worker.even_share("") == 0.0


def test_a_contender_that_dies_is_named_with_what_it_said(scripts, tmp_path):
    import rounds

    (tmp_path / "dies.py").write_text("import sys; print('hello'); sys.exit('no such environment')")
    with pytest.raises(rounds.ContenderError, match=r"(?s)mine ended with exit code 1.*no such environment"):
        rounds.alternate([rounds.Contender("mine", sys.executable, str(tmp_path / "dies.py"), {})], 1)


def test_sampling_is_measured_and_the_record_names_no_place_on_this_machine(scripts, tmp_path, monkeypatch):
    import benchmark

    out = tmp_path / "results" / "sampling.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "sampling", "--rounds=1", "--shapes", "micro", f"--out={out}"])
    benchmark.main()
    record = json.loads(out.read_text())
    row = record["results"]["micro"]["gcpo_jax"]
    assert row["rounds"][0]["tokens"] == 4 * 8 * 128 and row["rounds"][0]["compilations"] == 0
    assert row["tokens/s"]["median"] == pytest.approx(4 * 8 * 128 / row["rounds"][0]["seconds"])
    assert {"command", "commit", "date", "machine", "device"} <= set(record)
    assert str(tmp_path) not in out.read_text() and sys.executable not in out.read_text()
    assert record["command"] == "python scripts/benchmark.py sampling --rounds 1 --shapes micro"


def test_a_file_called_profile_does_not_hide_the_standard_librarys(scripts):
    program = "import cProfile, profile; print(profile.Profile, cProfile.Profile)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_both_parts_of_the_roofline_run(scripts):
    import benchmark
    import rounds

    spec = {"model": benchmark.MODELS["micro"], "dtype": "float32", "seed": 0, "samples": 2, "prompts": 1}
    spec |= {"prompt_tokens": 4, "new_tokens": 8, "changes": {"algorithm.beta": 0.0, "learner.micro_batch": 2}}
    both = [benchmark.ours(work, spec | {"work": work}) for work in ("update", "decode")]
    rows = rounds.alternate(both, 1).rows
    assert rows["update"][0]["tokens"] == 2 * 12 and 0 < rows["update"][0]["of_peak"] < 1
    assert rows["decode"][0]["tokens"] == 2 * 8 and rows["decode"][0]["peak_from"] == "measured"


def test_shares_of_waits_are_of_steps_that_compiled_nothing(scripts):
    import waiting

    def row(step, compilations=0, save=0.0):
        times = {"step": 2.0, "data": 0.01, "log": 0.02, "save": save}
        return {"step": step, "reward/mean": 1.0, "time/compilations": compilations} | {
            f"time/{k}_s": v for k, v in times.items()
        }

    # Step 1 is the first, 2 compiled; a checkpoint every 2 steps is waited for by steps 3 and 5.
    rows = [row(1), row(2, compilations=3), row(3, save=0.5), row(4), row(5, save=0.1)]
    result = waiting.shares(rows, [9.0, 9.0, 0.2, 0.2, 0.4], every=2)
    assert (result["steps"], result["saves"], result["seconds"]["median"]) == (3, 2, 2.0)
    median = {name: result["per_cent"][name]["median"] for name in waiting.WAITS}
    assert median == pytest.approx({"data": 0.5, "log": 1, "tokenize": 10, "save": 15})
    assert result["save, of all steps"] == pytest.approx(10) and "reward/mean" not in result["rows"][0]
    assert "| tiny | 2.00 | 0.50 (0.50) | 10.00 (20.00) | 1.00 (1.00) | 15.00 (25.00) | 10.00 |" in waiting.table(
        {"tiny": result}
    )
    with pytest.raises(ValueError, match="take more steps"):
        waiting.shares(rows[:2], [0.0] * 2, every=2)
