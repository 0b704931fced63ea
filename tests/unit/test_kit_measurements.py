"""Results files: what is read, what is refused, and the ones that come with the package."""

import json

import pytest

from peftlab.errors import PeftLabError
from peftlab.kit import measurements

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
    ],
)
def test_a_file_without_provenance_is_refused(demo, change, fault):
    content = json.loads(demo.read_text())
    change(content)
    demo.write_text(json.dumps(content))
    with pytest.raises(PeftLabError, match=f"demo.json: .*{fault}"):
        measurements.results(demo)


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


@pytest.mark.parametrize("topic", measurements.topics())
def test_results_of_the_package(topic):
    results = measurements.results(topic)
    assert results.topic == topic
    assert "/tmp" not in results.cite() and "/home" not in results.cite()
