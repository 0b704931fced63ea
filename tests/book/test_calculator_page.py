"""The calculator in the page gives the package's own numbers, by keyboard, from a link, and with its errors."""

import json
import random
import shlex
import statistics
import zipfile

import family_configs
import pytest
from peftlab_book import calculator, calculator_answers, calculator_page
from test_pages import RUN_AXE_ON_COLOURS, nothing_is_wider, violations

import peftlab as pl
from peftlab.commands import cli
from peftlab.memory import BUILT_IN, CARDS, cards, estimate, load_shape, measured_like
from peftlab.memory.estimate import OPTIMIZERS, PRECISIONS

PAGE = "book/appendix_calculator.html"
DRAWN = 52
SOON = 20  # seconds in which an answer is there, also on a busy machine
FEW = 3  # layers of a pasted configuration
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
# what a draw seldom meets: names of modules, options of one method, shards, half of the settings at once
CHOSEN = [
    {"shape": "llama-2-7b", "method": "lora", "r": 16, "targets": "all-linear"},
    {"shape": "llama-2-7b", "method": "qlora", "r": 64, "targets": ["q_proj", "v_proj"], "checkpointing": True},
    {"shape": "llama-2-7b", "method": "lora", "targets": "all-linear", "gpus": 8, "parallel": "fsdp"},
    {"shape": "smollm2-135m", "method": "lora", "four_bit": True, "library": "peftlab", "autocast": True,
     "adapter_precision": "bf16", "masters": True, "chunked_loss": True},
    {"shape": "gpt2", "method": "prefix", "virtual_tokens": 50, "sequence": 900, "attention": "eager"},
    {"shape": "bert-base", "method": "houlsby", "reduction_factor": 4, "labels": 5},
    {"shape": "minilm", "method": "lora", "bias": "all"},
    {"shape": "minilm", "method": "oft", "oft_block_size": 16},
    # no answer
    {"shape": "minilm", "method": "lora", "sequence": 600},
    {"shape": "minilm", "method": "lora", "targets": ["q_prj"]},
    {"shape": {"config": "{}"}, "method": "lora"},
]  # fmt: skip


def pasted(values: dict) -> dict:
    """The text of a configuration, with few layers."""
    few = {name: FEW for name in LAYERS if name in values}
    return {"config": json.dumps({name: value for name, value in values.items() if name != "layer_types"} | few)}


def questions() -> list[dict]:
    """Settings drawn once for all, and those of `CHOSEN`: each method, optimiser and built-in model is among them."""
    draw = random.Random(0)
    shapes = [pasted(BUILT_IN[name]) if load_shape(name).parameters > 5e8 else name for name in BUILT_IN]
    shapes += [pasted(family_configs.variant(family, seed=0)) for family in family_configs.DECODERS]
    lists = {
        "shape": shapes, "method": calculator.methods(), "precision": list(PRECISIONS), "optimizer": list(OPTIMIZERS),
        "batch": [1, 3, 16], "sequence": [64, 256, 400], "checkpointing": [False, True], "gpus": [1, 1, 2],
        "parallel": ["ddp", "fsdp"],
    }  # fmt: skip
    columns = {}
    for name, values in lists.items():
        columns[name] = (values * DRAWN)[:DRAWN]
        draw.shuffle(columns[name])
    drawn = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [without_defaults(question) for question in drawn] + CHOSEN


def without_defaults(question: dict) -> dict:
    """What the form says of a question."""
    if question["gpus"] == 1:
        question = {**question, "parallel": "ddp"}
    kept = ("shape", "method")
    return {n: value for n, value in question.items() if n in kept or value != calculator.default(n)}


def by_the_package(question: dict, folder) -> dict:
    """The numbers that the package gives, or its error."""
    shape, run = question["shape"], {name: value for name, value in question.items() if name != "shape"}
    if not isinstance(shape, str):
        (folder / "config.json").write_text(shape["config"], encoding="utf-8")
        shape = "config.json"
    try:
        found = estimate(shape, **run)
    except pl.PeftLabError as error:
        return {"error": str(error)}
    holding = cards.that_hold(found.peak_bytes)
    told = found.as_dict() | {
        "parts": found.parts, "with_margin": cards.with_margin(found.peak_bytes), "holding": holding,
        "measured": measured_like(shape, peak_bytes=found.peak_bytes, **run)._asdict(),
    }  # fmt: skip
    return json.loads(json.dumps(told))


@pytest.fixture(scope="module")
def page(browser, address):
    """The page with Python running, which takes seconds to start. It is started with the keyboard."""
    opened = browser.page()
    opened.open(address + PAGE)
    opened.before = list(opened.requests)
    opened.evaluate("document.getElementById('calc-load').focus(); true")
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    for kind, text in (("keyDown", "\r"), ("keyUp", "")):
        opened.command("Input.dispatchKeyEvent", type=kind, text=text, **enter)
    opened.shares = set()
    while not (shown(opened, "result") or shown(opened, "refused") or opened.problems):
        opened.shares.add(opened.evaluate("document.getElementById('calc-bar').value"))
        opened.browser.pump(0.05)
    assert shown(opened, "result"), [told(opened, "refused"), *opened.problems]
    yield opened
    opened.close()


def shown(page, name: str) -> bool:
    return page.evaluate(f"!document.getElementById('calc-{name}').hidden")


def told(page, name: str) -> str:
    return page.evaluate(f"document.getElementById('calc-{name}').textContent")


def count(page, selector: str) -> int:
    return page.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")


def fill(page, **values) -> None:
    """Change fields of the form as a reader does."""
    for name, value in values.items():
        page.evaluate(
            f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
            f"(document.querySelector('#calc-form [name={name}]')); true"
        )


def asked(page, function: str, question: dict):
    return page.evaluate(f"window.peftlabCalculator.{function}({json.dumps(question)})")


def test_an_error_of_the_packages_own_is_told_in_words(monkeypatch):
    """The page shows the answer's error as it is; without this it would be the last line of a traceback."""

    def fails(*args, **given):
        raise AssertionError

    monkeypatch.setattr(calculator_answers, "estimate", fails)
    answer = json.loads(calculator_answers.answer(json.dumps({"shape": "gpt2", "method": "lora"})))
    assert answer["field"] == "method"
    assert "with an error of its own (AssertionError)" in answer["error"] and "report" in answer["error"]


def test_python_is_loaded_only_when_it_is_asked_for(page):
    assert not [url for url in page.before if "pyodide" in url or ".zip" in url]
    assert len(page.shares) > 1 and max(page.shares) <= 1
    assert not shown(page, "start") and page.evaluate("document.activeElement.id") == "calc-result"


def test_the_first_answer_is_there_at_once(page):
    found = estimate("llama-2-7b", "lora", r=16, targets="all-linear")
    assert told(page, "peak") == pl.memory.format_bytes(found.peak_bytes)
    assert told(page, "needed") == pl.memory.format_bytes(cards.with_margin(found.peak_bytes))
    parts = "[...document.querySelectorAll('#calc-parts tr')].map(r => [r.dataset.part, r.cells[1].textContent])"
    rows = page.evaluate(parts)
    assert dict(rows) == {kind: pl.memory.format_bytes(size) for kind, size in found.parts.items()}
    assert "the backward pass" in told(page, "moment")
    assert count(page, "#calc-cards .calc-fits") == len(cards.that_hold(found.peak_bytes))
    assert count(page, "#calc-cards li") == len(CARDS)
    like = measured_like("llama-2-7b", "lora", r=16, targets="all-linear")
    assert told(page, "measured").startswith(f"{like.runs} runs on real GPUs")
    assert f"at most {-like.lowest:.2%} too low".replace("%", " %") in told(page, "measured")


def test_answers_are_those_of_the_package(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    every = questions()
    assert len(every) > 50
    answers = page.evaluate(
        f"(async all => {{ const found = []; for (const one of all) found.push(await window.peftlabCalculator.ask("
        f"'answer', one)); return found; }})({json.dumps(every)})"
    )
    times = [one["milliseconds"] for one in answers]
    print(f"\nan answer took {statistics.median(times):.0f} ms in the median, {max(times):.0f} ms at most")
    for question, message in zip(every, answers, strict=True):
        answer, expected = message["answer"], by_the_package(question, tmp_path)
        assert answer.get("error") == expected.get("error"), question
        if "error" not in expected:
            answer["holding"] = [card["name"] for card in answer["cards"] if card["fits"]]
            assert {name: answer[name] for name in expected} == expected, question
            assert max(size for _, size in answer["history"]) == expected["peak_bytes"], question
    good = [one["answer"] for one in answers if "error" not in one["answer"]]
    assert len(good) >= 50 and {one["method"] for one in good} == set(calculator.methods())


def test_a_link_brings_the_settings_back(page):
    for question in questions():
        link = asked(page, "fragment", question)
        assert page.evaluate(f"window.peftlabCalculator.restore({json.dumps(link)})") is True
        restored = page.evaluate("window.peftlabCalculator.question()")
        for one in (question, restored):  # the text of a configuration may be written in another way
            if isinstance(one["shape"], dict):
                one["shape"] = json.loads(one["shape"]["config"])
        assert restored == question


def test_a_link_opens_with_its_settings_and_loads_nothing(browser, address):
    page = browser.page()
    page.open(f"{address}{PAGE}#shape=gpt2&method=prefix&virtual_tokens=30&masters=yes")
    found = page.evaluate("window.peftlabCalculator.question()")
    assert found == {"shape": "gpt2", "method": "prefix", "virtual_tokens": 30, "masters": True}
    assert told(page, "command") == "peftlab memory gpt2 --method prefix --virtual-tokens 30 --masters"
    assert not [url for url in page.requests if "pyodide" in url]
    page.close()


@pytest.mark.parametrize("place", [*range(DRAWN, DRAWN + 8), 0, 1, 2])
def test_the_command_and_the_call_give_the_same_number(page, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    question = questions()[place]
    expected = by_the_package(question, tmp_path)
    command, call = asked(page, "command", question), asked(page, "call", question)
    program, *words = shlex.split(command)
    assert program == "peftlab"
    status = cli.main([*words, "--json"])
    printed = capsys.readouterr()
    if "error" in expected:
        assert status == 2 and expected["error"] in printed.err
        with pytest.raises(pl.PeftLabError):
            exec(call, {})
    else:
        assert json.loads(printed.out)["peak_bytes"] == expected["peak_bytes"]
        expression = call.splitlines()[-1].removeprefix("print(").removesuffix(")")
        assert eval(expression, {"pl": pl}).peak_bytes == expected["peak_bytes"]


def test_an_error_stands_at_its_field_and_the_last_answer_is_marked(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page.evaluate("window.peftlabCalculator.restore('#shape=minilm&method=lora&r=4'); true")
    fill(page, batch=2)
    right = pl.memory.format_bytes(estimate("minilm", r=4, batch=2).peak_bytes)
    assert page.until(f"document.getElementById('calc-peak').textContent === {json.dumps(right)}")
    wrong = [
        ("sequence", "600", {}), ("config", "{", {"sequence": "64", "shape": "pasted"}),
        ("config", '{"model_type": "lama"}', {}), ("names", "q_prj", {"shape": "minilm", "targets": "named"}),
    ]  # fmt: skip
    for field, value, also in wrong:
        fill(page, **also, **{field: value})
        expected = by_the_package(page.evaluate("window.peftlabCalculator.question()"), tmp_path)["error"]
        error = f"document.getElementById('calc-error-{field}')"
        assert page.until(f"!{error}.hidden && {error}.textContent === {json.dumps(expected)}")
        assert told(page, "said") == expected  # which is read out
        input_ = f"document.querySelector('#calc-form [name={field}]')"
        assert page.evaluate(f"{input_}.getAttribute('aria-invalid')") == "true"
        assert page.evaluate(f"{input_}.getAttribute('aria-describedby')") == f"calc-error-{field}"
        assert shown(page, "old") and not shown(page, "elsewhere") and told(page, "peak") == right
    fill(page, targets="", shape="pasted", config=json.dumps(BUILT_IN["minilm"]))
    assert page.until("document.getElementById('calc-old').hidden")
    assert count(page, "#calc-form [aria-invalid], .calc-error:not([hidden])") == 0
    right = pl.memory.format_bytes(estimate(BUILT_IN["minilm"], r=4, batch=2, sequence=64).peak_bytes)
    assert told(page, "peak") == right and shown(page, "elsewhere") and shown(page, "save")


@pytest.mark.parametrize(("field", "value", "label"), [
    ("r", "0", "Rank"), ("r", "20000000", "Rank"), ("sequence", "", "Tokens each"), ("gpus", "1.5", "GPUs"),
])  # fmt: skip
def test_a_field_that_cannot_be_so_is_marked_by_its_label(page, field, value, label):
    page.evaluate("window.peftlabCalculator.restore('#shape=minilm&method=lora&r=4'); true")
    fill(page, **{field: value})
    error = f"{label} must be a whole number from 1 to 16,777,216."
    assert page.until(f"document.getElementById('calc-error-{field}').textContent === {json.dumps(error)}", SOON)
    assert not shown(page, "elsewhere") and told(page, "said") == error


@pytest.mark.parametrize(("link", "unknown", "rest"), [
    ("shape=gpt2&method=nosuch", "method=nosuch", {"shape": "gpt2"}),
    ("shape=nosuch&r=abc", "shape=nosuch, r=abc", {}),
    ("shape=gpt2&checkpointing=maybe", "checkpointing=maybe", {"shape": "gpt2"}),
    ("method=qlora&optimizer=zzz&parallel=", "optimizer=zzz, parallel=", {"method": "qlora"}),
    ("shape=gpt2&colour=red&r=4", "colour=red", {"shape": "gpt2", "r": 4}),
    ("\"]=1&targets=c_attn&shape=gpt2", "\"]=1", {"shape": "gpt2", "targets": ["c_attn"]}),
])  # fmt: skip
def test_a_link_with_what_is_not_known_says_so(page, link, unknown, rest):
    assert page.evaluate(f"window.peftlabCalculator.restore({json.dumps('#' + link)})") is True
    settings = "settings" if ", " in unknown else "a setting"
    assert told(page, "unknown") == f"This link has {settings} that the page does not know: {unknown}."
    assert shown(page, "unknown")
    asked_for = page.evaluate("window.peftlabCalculator.question()")
    assert asked_for == {"shape": "llama-2-7b", "method": "lora", **rest}
    assert page.evaluate("window.peftlabCalculator.restore('#shape=gpt2')") and not shown(page, "unknown")
    assert page.evaluate("window.peftlabCalculator.restore('#what-the-numbers-mean')") is False


def test_what_was_not_measured_and_what_is_left_out_is_said(page):
    page.evaluate("window.peftlabCalculator.restore('#shape=minilm&method=lora'); true")
    fill(page, r=2000, masters="yes", adapter_precision="bf16")
    assert page.until("document.getElementById('calc-beyond').textContent.includes('2,000')", SOON)
    assert "Float32 masters of the adapter: True" in told(page, "beyond") and shown(page, "beyond")
    both = {"model_type": "gemma3", "text_config": json.loads(pasted(BUILT_IN["qwen2.5-0.5b"])["config"])}
    fill(page, r=4, masters="no", adapter_precision="fp32", shape="pasted", config=json.dumps(both))
    assert page.until("!document.getElementById('calc-part').hidden", SOON) and not shown(page, "beyond")


def test_a_model_without_an_answer_is_marked_at_the_model(page):
    page.evaluate("window.peftlabCalculator.restore('#method=lora&config=%7B%7D'); true")
    fill(page, config=pasted(family_configs.variant("deepseek_v3", seed=0))["config"])
    assert page.until("document.getElementById('calc-error-config').textContent.includes('not known yet')", SOON)
    fill(page, config='{"model_type": "frobnicator"}')
    assert page.until("document.getElementById('calc-error-config').textContent.includes('frobnicator')", SOON)
    assert "llama, " in told(page, "error-config") and "deepseek_v3" not in told(page, "error-config")


def test_a_text_that_is_too_long_is_refused_and_a_long_one_has_no_link(page):
    fill(page, shape="pasted", config="x" * 500_001)
    assert page.until("document.getElementById('calc-error-config').textContent.includes('500,001')", SOON)
    fill(page, config=json.dumps({**BUILT_IN["minilm"], "more": "x" * 9000}))
    assert page.until("!document.getElementById('calc-no-link').hidden", SOON)
    assert len(page.evaluate("location.href")) < 200


def test_python_that_failed_is_started_again(page):
    page.evaluate("window.peftlabCalculator.restore('#shape=minilm&method=lora'); true")
    fill(page, shape="pasted", config="[" * 20_000 + "]" * 20_000)
    error = "document.getElementById('calc-error-config')"
    assert page.until(f"!{error}.hidden && {error}.textContent.includes('20,000 deep')", SOON)
    # any failure ends the worker, and with it the question that waits
    page.evaluate(
        "Promise.all([window.peftlabCalculator.ask('nosuch', {}).catch(() => 0), window.peftlabCalculator.answer()])"
        ".then(() => true)"
    )
    assert told(page, "error-config").startswith("Python stopped at this question (")
    assert told(page, "said") == told(page, "error-config") and not told(page, "short").count("fits")
    fill(page, shape="minilm", r=8)
    right = pl.memory.format_bytes(estimate("minilm", r=8).peak_bytes)
    assert page.until("['old', 'start'].every(name => document.getElementById(`calc-${name}`).hidden)", SOON)
    assert told(page, "peak") == right
    assert not shown(page, "refused") and shown(page, "elsewhere")


def test_the_curve_is_that_of_the_package(page):
    page.evaluate("window.peftlabCalculator.restore('#shape=minilm&method=lora&r=4&sequence=100'); true")
    fill(page, batch=4)
    assert page.until("document.querySelector('#calc-curve-table [data-sequence=\"100\"]')")
    rows = page.evaluate(
        "[...document.querySelectorAll('#calc-curve-table tr')].map(r => [+r.dataset.sequence, r.cells[1].textContent])"
    )
    assert [length for length, _ in rows] == [2, 4, 8, 16, 32, 64, 100, 128, 256, 512]
    for length, peak in rows:
        assert peak == pl.memory.format_bytes(estimate("minilm", r=4, batch=4, sequence=length).peak_bytes)
    assert count(page, "#calc-curve circle") == len(rows)
    assert "The table below has all values" in page.evaluate("document.querySelector('#calc-curve svg').ariaLabel")


def test_fields_come_with_what_the_method_takes(page):
    hidden = "[...document.querySelectorAll('#calc-form .calc-field')].filter(e => e.hidden).map(e => e.dataset.field)"
    page.evaluate("window.peftlabCalculator.restore('#shape=gpt2&method=prompt'); true")
    assert {"r", "targets", "names", "config", "bias", "parallel"} <= set(page.evaluate(hidden))
    page.evaluate("window.peftlabCalculator.restore('#shape=gpt2&method=lora&targets=c_attn&gpus=2'); true")
    assert not {"r", "targets", "names", "bias", "parallel"} & set(page.evaluate(hidden))


def test_every_field_has_one_label(page):
    fields = "[...document.querySelectorAll('#calc-form :is(select, input, textarea)')]"
    assert set(page.evaluate(f"{fields}.map(e => e.labels.length)")) == {1}


def test_the_answer_is_accessible(page):
    page.evaluate("window.peftlabCalculator.restore('#shape=gpt2&method=lora&r=0'); true")
    fill(page, batch=1)
    assert page.until("!document.getElementById('calc-old').hidden")  # an error is judged, too
    assert violations(page) == []
    page.colours(dark=True)
    assert page.until("document.documentElement.dataset.theme === 'dark'")
    assert violations(page, RUN_AXE_ON_COLOURS) == []
    page.resize(390, 844)
    page.browser.pump(0.2)
    nothing_is_wider(page)
    page.colours(dark=False)
    page.resize(1280, 900)


def test_nothing_is_asked_of_another_host(page, address):
    assert [url for url in page.requests if not url.startswith(address)] == []
    assert page.problems == []


def test_a_file_says_that_it_cannot_and_gives_the_command(browser, site):
    page = browser.page()
    page.open((site / PAGE).as_uri() + "#shape=gpt2&method=lora")
    assert "was opened as a file" in told(page, "refused") and not shown(page, "start")
    assert told(page, "command") == "peftlab memory gpt2 --method lora"
    page.close()


def test_a_browser_without_webassembly_is_told(browser, address):
    page = browser.page()
    page.command("Page.addScriptToEvaluateOnNewDocument", source="delete window.WebAssembly")
    page.open(address + PAGE)
    assert "has no WebAssembly" in told(page, "refused") and not shown(page, "start")
    assert told(page, "command") == calculator_page.COMMAND
    page.close()


def test_the_archive_holds_the_package_as_it_is(site):
    with zipfile.ZipFile(site / calculator.ARCHIVE) as archive:
        for name in archive.namelist():
            source = calculator.ANSWERS if name == calculator.ANSWERS.name else calculator.PACKAGE.parent / name
            assert archive.read(name) == source.read_bytes(), name
        outside = [name for name in archive.namelist() if not name.startswith("peftlab/memory/")]
    assert len(outside) < 10  # the estimator stands apart: it imports little of the package
