"""Results files: what is read, what is refused, and the ones that come with the package."""

import json

import pytest

from peftlab.errors import PeftLabError
from peftlab.kit import measurements, tables

PROVENANCE = {"gpu": None, "cpu": "two cores", "versions": {"torch": "2.11.0", "peft": "0.21.0"}, "date": "2026-11-22",
              "command": "peftlab bench demo --out demo.json"}
ROWS = [{"method": "lora", "r": 8, "seed": 0, "score": 0.5}, {"method": "lora", "r": 8, "seed": 1, "score": 0.6},
        {"method": "lora", "r": 16, "seed": 0, "score": 0.7}, {"method": "full", "score": 0.9}]


@pytest.fixture
def demo(tmp_path):
    path = tmp_path / "demo.json"
    measurements.write(path, "demo", PROVENANCE, ROWS)
    return path


def test_what_is_written_is_read(demo):
    results = measurements.results(demo)
    assert results.rows == ROWS and results.provenance == PROVENANCE and results.topic == "demo"
    assert len(demo.read_text().splitlines()) >= len(ROWS), "one row a line"
    assert not list(demo.parent.glob("*.part"))


def test_cite_says_machine_versions_date_and_command(demo):
    line = measurements.results(str(demo)).cite()
    assert line == ("Measured on two cores, 2026-11-22 (peft 0.21.0, torch 2.11.0). "
                    "To repeat it: peftlab bench demo --out demo.json")


def test_rows_are_chosen(demo):
    results = measurements.results(demo)
    assert results.where(r=8).column("score") == [0.5, 0.6]
    assert results.where(r=[8, 16], seed=0).column("r") == [8, 16]
    assert len(results.where(score=lambda s: s > 0.55)) == 3
    assert results.where(r=8).cite() == results.cite()
    assert results.one(r=16)["score"] == 0.7


def test_a_choice_that_misses_says_what_there_is(demo):
    results = measurements.results(demo)
    with pytest.raises(PeftLabError, match="2 rows have r=8; they differ in seed, score"):
        results.one(r=8)
    with pytest.raises(PeftLabError, match="no row has r=4. Values there: r: 8, 16"):
        results.one(r=4)
    with pytest.raises(PeftLabError, match="no column 'scor'.*Did you mean 'score'"):
        results.where(scor=1)
    with pytest.raises(PeftLabError, match="no results 'nonsense'; there are: "):
        measurements.results("nonsense")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: c.pop("provenance"), "no provenance"),
        (lambda c: c["provenance"].update(cpu=None), "neither a gpu nor a cpu"),
        (lambda c: c["provenance"].update(versions={}), "no versions"),
        (lambda c: c["provenance"].pop("date"), "no date"),
        (lambda c: c["provenance"].update(date="yesterday"), "YYYY-MM-DD.*'yesterday'"),
        (lambda c: c["provenance"].update(command=" "), "no command"),
        (lambda c: c.update(rows=[]), "no rows"),
        (lambda c: c["rows"].append({"nested": [1]}), "row 4 is not a flat"),
        (lambda c: c.pop("topic"), "no topic"),
        (lambda c: c["provenance"].update(runs={"aaaaaa": {"host": "x"}}), "does not say host, cpu, date of each run"),
        (lambda c: c["provenance"].update(runs={"aaaaaa": dict.fromkeys(measurements.RUN, "x")}),
         "row 0 names the run None, which its provenance does not know"),
    ],
)
def test_a_file_without_provenance_is_refused(demo, change, fault):
    content = json.loads(demo.read_text())
    change(content)
    demo.write_text(json.dumps(content))
    with pytest.raises(PeftLabError, match=f"demo.json: .*{fault}"):
        measurements.results(demo)


RUNS = {
    "aaaaaa": {"host": "90ab34cd", "cpu": "two cores", "date": "2026-11-22"},
    "bbbbbb": {"host": "0f0f0f0f", "cpu": "four cores", "date": "2026-11-23"},
}  # fmt: skip


@pytest.fixture
def timed(tmp_path):
    """Two things that one run timed in three processes, and one that another run timed."""
    path = tmp_path / "timed.json"
    rows = [
        {"state": state, "seconds": times[1], **{f"seconds_{n}": t for n, t in enumerate(times, 1)}, "processes": 3,
         "busy_seconds": 0.5, "run": run}
        for state, times, run in (("base", (1.0, 2.0, 4.0), "aaaaaa"), ("attached", (3.0, 4.0, 4.0), "aaaaaa"),
                                  ("merged", (1.0, 2.0, 3.0), "bbbbbb"))
    ]  # fmt: skip
    measurements.write(path, "timed", {**PROVENANCE, "runs": RUNS}, rows)
    return measurements.results(path)


def test_rows_of_one_run_may_be_compared(timed):
    assert timed.within_run(state=["base", "attached"]).rows == timed.where(state=["base", "attached"]).rows
    assert timed.within_run(run="bbbbbb").column("state") == ["merged"]
    with pytest.raises(PeftLabError) as refused:
        timed.within_run(state=lambda state: state != "base")
    assert str(refused.value) == (
        "results 'timed': these rows are of 2 runs: aaaaaa (host 90ab34cd, 2026-11-22), bbbbbb (host 0f0f0f0f, "
        "2026-11-23). Times may be compared within one run only. Add a condition, for example run='aaaaaa'.")


def test_a_ratio_of_times_is_taken_in_each_process_and_within_a_run(timed):
    base, attached, merged = timed
    ratio = timed.ratio(attached, base)
    assert ratio == (2.0, 1.0, 3.0) and str(ratio) == "2.00 (1.00 to 3.00)"
    assert timed.ratio(base, base, "busy_seconds") == (1, 1, 1)  # one process read these
    with pytest.raises(PeftLabError, match="of two runs: bbbbbb .host 0f0f0f0f.* and aaaaaa .*within one run only"):
        timed.ratio(merged, base)
    with pytest.raises(PeftLabError, match="no 'busy_second'.*Did you mean 'busy_seconds'"):
        timed.ratio(attached, base, "busy_second")


def test_a_file_from_before_there_were_runs_is_one_run(demo):
    results = measurements.results(demo)
    assert results.within_run(method="lora").rows == results.where(method="lora").rows
    assert results.ratio(results.rows[1], results.rows[0], "score") == (1.2, 1.2, 1.2)
    assert results.when == "2026-11-22"


def test_the_badge_says_that_there_were_several_runs(timed):
    assert "2026-11-22, in 2 runs" in tables.badge(timed) and "2026-11-22, in 2 runs" in timed.cite()


def test_a_failed_write_leaves_the_old_file(demo, monkeypatch):
    before = demo.read_bytes()

    def full(*paths):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(PeftLabError, match="cannot be written: no space left"):
        patch.setattr("os.replace", full)
        measurements.write(demo, "demo", PROVENANCE, ROWS[:1])
    with pytest.raises(PeftLabError, match="demo.json: row 1 holds nan in the column 'score'"):
        measurements.write(demo, "demo", PROVENANCE, [{"score": 1.0}, {"score": float("nan")}])
    assert demo.read_bytes() == before and list(demo.parent.iterdir()) == [demo]


@pytest.mark.parametrize("file", measurements.topics())
def test_results_of_the_package(file):
    """A file is named after its topic. Some sections of a topic may have a file of their own: `lora_fullsize`."""
    results = measurements.results(file)
    assert file == results.topic or file.startswith(f"{results.topic}_")
    assert "/tmp" not in results.cite() and "/home" not in results.cite()
