"""A bar that is seen by people and leaves nothing behind, in terminals and in notebooks."""

import io
import queue

import pytest
from patience import HUNG_SECONDS

from peftlab import progress

CELL = """
from peftlab import progress
progress.INTERVAL = 0.0
for item in progress.track(range(3), "Working"):
    pass
print("last", item)
"""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("PEFTLAB_PROGRESS", raising=False)


def test_terminal_bar_is_rewritten_and_wiped(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    assert list(progress.track("abc", "Reading")) == ["a", "b", "c"]
    drawn = stream.getvalue()
    assert "Reading  [########################] 3/3" in drawn and "\n" not in drawn
    assert drawn.endswith("\r\x1b[K"), "the line is empty at the end"


def test_an_error_wipes_the_bar_too(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with pytest.raises(KeyError), progress.Bar(5, "Training"):
        raise KeyError
    assert stream.getvalue().endswith("\r\x1b[K")


def test_nothing_is_written_where_nobody_watches(monkeypatch, capfd):
    for _ in progress.track(range(3), "Working"):
        pass
    assert capfd.readouterr() == ("", "")
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("PEFTLAB_PROGRESS", "off")
    list(progress.track(range(3)))
    list(progress.track(range(3), enabled=False))
    assert stream.getvalue() == ""


def test_line_shows_rate_and_time_left(monkeypatch):
    clock = iter([0.0, 10.0, 50.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    bar = progress.Bar(60, "Training", initial=10)
    bar.update(20, note="loss 0.71")
    assert bar.line() == "Training  [############------------] 30/60 · 2.0 step/s · 0:15 left · loss 0.71"
    bar.total = None
    assert bar.line() == "Training  30 steps · 2.5 s/step · loss 0.71"


def test_clock():
    assert [progress._clock(seconds) for seconds in (0, 67, 3725)] == ["0:00", "1:07", "1:02:05"]


@pytest.fixture(scope="module")
def kernel():
    manager = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipykernel")
    kernel_manager, client = manager.start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    kernel_manager.shutdown_kernel(now=True)


def outputs(client, allow_stdin):
    """The messages one cell sends, but for those about the kernel's state."""
    client.execute(CELL, allow_stdin=allow_stdin)
    messages = []
    while True:
        try:
            message = client.get_iopub_msg(timeout=HUNG_SECONDS)
        except queue.Empty:
            pytest.fail("the kernel says nothing")
        if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            return [(m["msg_type"], m["content"]) for m in messages if m["msg_type"] not in ("status", "execute_input")]
        messages.append(message)


def test_a_notebook_executed_by_a_program_stores_no_trace(kernel):
    assert outputs(kernel, allow_stdin=False) == [("stream", {"name": "stdout", "text": "last 2\n"})]


def test_a_person_in_a_notebook_sees_a_bar_that_ends_empty(kernel):
    messages = outputs(kernel, allow_stdin=True)
    kinds = [kind for kind, _ in messages]
    assert kinds[0] == "display_data" and set(kinds[1:]) == {"update_display_data", "stream"}
    shown = [content["data"]["text/plain"] for kind, content in messages if kind != "stream"]
    assert shown[0].startswith("Working  [----") and "3/3" in shown[-2] and shown[-1] == ""
    handles = {content["transient"]["display_id"] for kind, content in messages if kind != "stream"}
    assert len(handles) == 1, "one output, updated in place"
