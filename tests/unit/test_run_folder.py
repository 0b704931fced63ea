"""`peftlab train --out`: whatever a person has in a folder stays there, and only what a run made is replaced."""

import json
import os
import shutil

import pytest
from test_cli import run, train_command
from tiny import llama, tokenizer

from peftlab.commands import run_folder
from peftlab.errors import PeftLabError
from peftlab.training import files as run_files

RECORD = run_folder.RECORD


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny model and two data files, as the current one."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("tiny")
    tokenizer(pad=False).save_pretrained("tiny")
    rows = [{"prompt": f"the {word} cat ?", "completion": "yes"} for word in ("red", "green", "blue") * 3]
    (tmp_path / "ask.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "read.txt").write_text("the red cat runs .\nthe blue dog sleeps .\n" * 3)
    return tmp_path


def tree(folder):
    """Every file and link below a folder, with its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} is mine")


PROJECTS = {
    "a thesis": ["thesis.tex", "figures/one.pdf"],
    "names of ours": ["metrics.json", "settings.json", "adapter_config.json", "adapter_model.safetensors"],
    "a model and runs of another tool": ["model/weights.bin", "run/step-00000001/state.json", "run/step-by-step.md"],
    "hidden": [".git/config"],
    "a lock of another tool": [".lock"],
    "a draft of ours by chance": [".model-abcd1234/notes.txt", ".writing-12/notes.txt"],
    "another tool's settings": ["settings.json", "run/log.txt"],
}


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("more", [[], ["--no-resume"], ["--method", "full"]], ids=" ".join)
def test_a_folder_with_anything_in_it_is_refused_and_left_alone(place, capsys, project, more):
    put(place / "mine", *PROJECTS[project])
    before = tree(place)
    status, out, err = run(capsys, *train_command("ask.jsonl", "mine", "--steps", 2, *more))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert PROJECTS[project][0].split("/")[0] in err and "another folder" in err
    assert tree(place) == before


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (".", "./tiny would be overwritten|is no folder of a run"),
        ("tiny", "./tiny would be overwritten"),
        ("./x/../tiny", "./tiny would be overwritten"),
        ("link-to-tiny", "./tiny would be overwritten"),
        ("link-to-project", "is no folder of a run, and it holds thesis.tex"),
        ("link-to-nothing", "is a file, or a link that leads nowhere"),
        ("ask.jsonl", "is a file"),
        ("ask.jsonl/deep/run", "ask.jsonl is a file"),
        ("tiny/config.json/run", "config.json is a file"),
    ],
)
def test_places_that_cannot_be_the_out_folder(place, capsys, out, said):
    put(place / "project", "thesis.tex")
    (place / "x").mkdir()
    (place / "link-to-tiny").symlink_to("tiny")
    (place / "link-to-project").symlink_to(place / "project")
    (place / "link-to-nothing").symlink_to("nothing")
    before = tree(place)
    status, stdout, err = run(capsys, *train_command("ask.jsonl", out, "--steps", 2))
    assert (status, stdout) == (2, "") and err.count("\n") == 1
    assert any(words in err for words in said.split("|")), err
    assert tree(place) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--data", "nosuch.jsonl"], "nosuch.jsonl"),
        (["--model", "./nosuch"], "no folder './nosuch'"),
        (["--targets", "nothing_proj"], "matches no module"),
        (["--r", 0], ""),
        (["--warmup", -3], "warmup"),
        (["--max-length", 9999], "--max-length"),
        (["--method", "bitfit"], "no biases"),
    ],
)
def test_nothing_is_made_or_removed_before_all_is_known_to_be_good(place, capsys, change, said):
    command = train_command("ask.jsonl", "run", "--steps", 2)
    assert run(capsys, *command)[0] == 0
    before = tree(place)
    for more in ([], ["--no-resume"]):
        status, _, err = run(capsys, *command, *change, *more)
        assert status == 2 and (said in err or "holds another run" in err)
        assert tree(place) == before
    status, _, err = run(capsys, *train_command("ask.jsonl", "new/deep", "--steps", 2), *change)
    assert status == 2 and said in err and not (place / "new").exists()


def test_starting_again_removes_what_the_run_made_and_nothing_else(place, capsys):
    full = train_command("read.txt", "run", "--method", "full", "--steps", 2)
    assert run(capsys, *full)[0] == 0
    put(place / "run", "thesis.tex", "run/notes.txt", "model/README.md", "run/step-00000002/why.txt", "run/step-x/a")
    mine = {name: content for name, content in tree(place / "run").items() if content and b"is mine" in content}
    assert len(mine) == 5
    lora = train_command("ask.jsonl", "run", "--steps", 3, "--no-resume")
    assert run(capsys, *lora)[0] == 0
    now = tree(place / "run")
    assert mine.items() <= now.items() and "adapter_config.json" in now and "model/config.json" not in now
    status, _, err = run(capsys, *full, "--no-resume")
    assert status == 2 and "holds model/" in err  # which is not a run's any more
    assert mine.items() <= tree(place / "run").items()


def test_what_lies_beside_a_saved_model_stays_when_it_is_saved_again(place, capsys):
    command = train_command("read.txt", "run", "--method", "full", "--steps", 2)
    assert run(capsys, *command)[0] == 0
    put(place / "run", "model/README.md", "model/notes/plan.txt")
    assert run(capsys, *command)[0] == 0
    now = tree(place / "run")
    assert now["model/README.md"] and now["model/notes/plan.txt"] and now["model/model.safetensors"]
    assert [name for name in now if name.startswith(".model")] == []


@pytest.mark.parametrize("name", ["metrics.json", "adapter_model.safetensors", "settings.json", "adapter_config.json"])
def test_a_file_that_was_put_in_the_place_of_a_runs_is_not_replaced(place, capsys, name):
    command = train_command("ask.jsonl", "run", "--steps", 2)
    assert run(capsys, *command)[0] == 0
    (place / "run" / name).write_text(json.dumps(json.loads((place / "run" / "settings.json").read_text())) + "\n\n")
    before = tree(place)
    for more in ([], ["--no-resume"]):
        status, _, err = run(capsys, *command, *more)
        assert status == 2 and name in err and "no run here made" in err
        assert tree(place) == before


def test_links_inside_the_folder_are_not_followed(place, capsys):
    command = train_command("read.txt", "run", "--method", "full", "--steps", 2)
    assert run(capsys, *command)[0] == 0
    shutil.move(place / "run" / "model", place / "kept")
    (place / "run" / "model").symlink_to(place / "kept")
    before = tree(place)
    status, _, err = run(capsys, *command, "--no-resume")
    assert status == 2 and "model" in err and tree(place) == before


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"files": {"../thesis.tex": ["SUM"], "/PLACE/thesis.tex": ["SUM"], "thesis.tex": ["SUM"], '
               '"model/../thesis.tex": ["SUM"]}}'],
)  # fmt: skip
def test_a_record_from_elsewhere_removes_nothing(place, capsys, record):
    put(place, "thesis.tex")
    put(place / "run", "thesis.tex")
    total = run_folder.file_sum(place / "thesis.tex")
    (place / "run" / RECORD).write_text(record.replace("SUM", total).replace("PLACE", str(place)[1:]))
    run(capsys, *train_command("ask.jsonl", "run", "--steps", 2, "--no-resume"))
    assert (place / "thesis.tex").exists() and (place / "run" / "thesis.tex").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_an_older_version_goes_on(place, capsys, method, finished):
    command = train_command("ask.jsonl", "run", "--method", method, "--steps", 4, "--save-every", 2)
    assert run(capsys, *command)[0] == 0
    expected = tree(place / "run")
    (place / "run" / RECORD).unlink()
    if not finished:
        (place / "run" / "metrics.json").unlink()
    put(place / "run", "thesis.tex")
    before = tree(place)
    status, _, err = run(capsys, *command, "--no-resume")  # what is its own cannot be known
    assert status == 2 and "older version" in err and tree(place) == before
    status, _, err = run(capsys, *command, "--seed", 7)
    assert status == 2 and "--seed was 0, now 7" in err and "--no-resume" not in err and tree(place) == before
    status, _, err = run(capsys, *command)
    assert status == 0, err
    now = tree(place / "run")
    assert now.pop("thesis.tex") and now.keys() == expected.keys()
    if method == "lora":
        assert now["adapter_model.safetensors"] == expected["adapter_model.safetensors"]


def test_a_data_set_of_the_book_is_no_folder(place, capsys, monkeypatch):
    """`--data reviews --out reviews` is what the help shows: the name is the data set's, the folder the run's."""
    (place / "reviews").mkdir()
    run_folder.claim("reviews", {"model": "minilm", "data": "reviews"}, True)
    monkeypatch.setattr("peftlab.commands.train._train", lambda *_: (_ for _ in ()).throw(PeftLabError("reached")))
    status, _, err = run(capsys, "train", "--model", "minilm", "--data", "reviews", "--out", "reviews")
    assert status == 2 and "reached" in err


def test_killed_between_the_record_and_the_file(tmp_path):
    """The file before is still known as the run's own."""
    place = run_folder.claim(tmp_path, {"model": "m"}, True)
    run_folder.write_metrics(place, {"loss": 1})
    place.note({"metrics.json": "0" * 64})  # and the process dies here
    again = run_folder.look(tmp_path, {"model": "m"}, True)
    assert again.is_ours("metrics.json") and again.foreign(False) == []


def test_a_model_killed_between_two_renames_comes_back(tmp_path):
    place = run_folder.claim(tmp_path, {"model": "m"}, True)
    (tmp_path / ".model-abcdefgh").mkdir()
    (tmp_path / ".model-abcdefgh" / "model.safetensors").write_text("new")
    put(tmp_path / ".model-abcdefgh-old", "model.safetensors", "notes.txt")
    run_folder.sweep(place)
    assert tree(tmp_path / "model").keys() == {"model.safetensors", "notes.txt"}
    assert [path.name for path in tmp_path.glob(".model-*")] == []


# ------------------------------------------------------------------------------------- the other commands that write


def test_a_runs_state_lies_beside_other_things(tmp_path):
    put(tmp_path, "step-by-step.md", "step-1/notes.txt", "step-00000001x/a", ".writing-notes/a")
    put(tmp_path, "step-00000003/why.txt", "step-00000004/why.txt")
    run_files.write(tmp_path, 2, {}, {})
    run_files.write(tmp_path, 4, {}, {})
    (tmp_path / ".writing-77").mkdir()
    (tmp_path / ".writing-77" / "tensors.safetensors").write_text("half")
    run_files.clean(tmp_path)
    assert run_files.newest(tmp_path).name == "step-00000004"
    found = tree(tmp_path)
    assert sum(content is not None and b"is mine" in content for content in found.values()) == 6
    assert "step-00000002" not in found and ".writing-77" not in found


@pytest.mark.parametrize("content", ["my thesis", "[1, 2]", '{"topic": "lora"}', ""])
def test_a_bench_does_not_overwrite_what_is_no_results_file(tmp_path, content):
    from peftlab import bench

    for name in ("out.json", "out.json.partial"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(content or "\n")
        with pytest.raises(PeftLabError, match="out.json"):
            bench.run("lora", folder / "out.json", only=["nothing"] if name == "out.json" else None)
        assert (folder / name).read_text() == (content or "\n")
    with pytest.raises(PeftLabError, match="is there and holds no results"):
        bench.run("lora", tmp_path)


def test_what_somebody_put_into_the_cache_stays_when_it_is_mended(tmp_path):
    from peftlab.assets import cache

    put(tmp_path / "final", "model.bin", "adapter/notes.txt", cache.STAMP)
    put(tmp_path / "stage" / "finished", cache.STAMP, "model.bin", "deep/er.json")
    (tmp_path / "stage" / "finished" / "model.bin").write_text("whole")
    cache.publish(tmp_path / "stage" / "finished", tmp_path / "final")
    found = tree(tmp_path / "final")
    assert found["model.bin"] == b"whole" and found["adapter/notes.txt"] and found["deep/er.json"]


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000, "{", "\x00"], ids=["list", "3", "deep", "broken", "nul"])
def test_settings_that_are_no_settings_are_one_line(place, capsys, content):
    assert run(capsys, *train_command("ask.jsonl", "run", "--steps", 1))[0] == 0
    (place / "run" / "settings.json").write_text(content)
    status, out, err = run(capsys, *train_command("ask.jsonl", "run", "--steps", 1))
    assert (status, out) == (2, "") and err.count("\n") == 1, err
    (place / "run" / RECORD).write_text(content)
    status, out, err = run(capsys, *train_command("ask.jsonl", "run", "--steps", 1))
    assert (status, out) == (2, "") and err.count("\n") == 1, err
