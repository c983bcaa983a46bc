"""A store behind an HTTP server on this machine that lies about its files in all the ways that servers can."""

import gzip
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ENDLESS = bytes(1 << 16)
BOMB = gzip.compress(bytes(20 << 20), compresslevel=1)
PAGE = b"\n<!DOCTYPE html>\n<html><body>Please log in.</body></html>" + b" " * 600


class LyingServer(ThreadingHTTPServer):
    """Serves the files of a folder, with a lie about some.

    Args:
        folder: the store.

    Attributes:
        url: of the store.
        lies: name of a file -> a method of `Lies` that answers for it.
        requests: requests for each file, by name.
        pause: seconds between two bytes of a server that drips.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Lies)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}/store"
        self.lies: dict[str, Callable[[Lies, str, bytes], object]] = {}
        self.requests: Counter[str] = Counter()
        self.pause = 2.0
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> "LyingServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients leave a liar in the middle."""


class Lies(BaseHTTPRequestHandler):
    """One answer. Each lie gets the file's name and its true bytes."""

    server: LyingServer

    def do_GET(self) -> None:
        name = self.path.removeprefix("/store/").partition("?")[0]
        self.server.requests[name] += 1
        file = self.server.folder / name
        if not file.is_file() and name not in self.server.lies:
            self.send_error(404)
            return
        data = file.read_bytes() if file.is_file() else b""
        self.server.lies.get(name, Lies.truth)(self, name, data)

    def log_message(self, *_: object) -> None:
        pass

    def head(self, **headers: object) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def truth(self, _: str, data: bytes) -> None:
        self.head(Content_Length=len(data))
        self.wfile.write(data)

    def endless(self, _: str, data: bytes) -> None:
        self.head()
        self.wfile.write(data)
        while True:
            self.wfile.write(ENDLESS)

    def petabyte(self, _: str, data: bytes) -> None:
        self.head(Content_Length=1 << 50)
        self.wfile.write(data)
        while True:
            self.wfile.write(ENDLESS)

    def drips(self, _: str, data: bytes) -> None:
        self.head(Content_Length=len(data))
        for byte in data:
            self.wfile.write(bytes([byte]))
            time.sleep(self.server.pause)

    def stalls(self, _: str, data: bytes) -> None:
        self.head(Content_Length=len(data))
        self.wfile.write(data[: len(data) // 2])
        self.server.closing.wait()

    def silent(self, *_: object) -> None:
        self.server.closing.wait()

    def endless_headers(self, *_: object) -> None:
        self.send_response(200)
        self.flush_headers()
        for number in itertools.count():
            self.wfile.write(b"X-%d: %s\r\n" % (number, b"x" * 4000))

    def drips_headers(self, *_: object) -> None:
        self.send_response(200)
        self.flush_headers()
        for number in itertools.count():
            self.wfile.write(b"X-%d: x\r\n" % number)
            time.sleep(self.server.pause)

    def web_page(self, *_: object) -> None:
        self.head(Content_Type="text/html", Content_Length=len(PAGE))
        self.wfile.write(PAGE)

    def shorter(self, _: str, data: bytes) -> None:
        self.truth(_, data[:-1])

    def longer(self, _: str, data: bytes) -> None:
        self.truth(_, data + b"x")

    def untold_longer(self, _: str, data: bytes) -> None:
        self.head()
        self.wfile.write(data + b"x")

    def cut(self, _: str, data: bytes) -> None:
        self.head(Content_Length=len(data))
        self.wfile.write(data[: len(data) // 2])

    def bomb(self, *_: object) -> None:
        self.head(Content_Encoding="gzip", Content_Length=len(BOMB))
        self.wfile.write(BOMB)

    def to_a_file(self, *_: object) -> None:
        self._redirect("file:///etc/passwd")

    def in_circles(self, *_: object) -> None:
        self._redirect(f"{self.path.partition('?')[0]}?{time.monotonic_ns()}")

    def forbidden(self, *_: object) -> None:
        self.send_error(403)

    def _redirect(self, location: str) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()
