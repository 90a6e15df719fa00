"""A server of datasets, well behaved or not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def server(behaviour: str, body: bytes = b"", failures: int = 0) -> Iterator[tuple[str, list[str]]]:
    """A real HTTP server on this machine; yields its address and the list of requests it had."""
    requests: list[str] = []
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            if behaviour == "silent":
                release.wait(30)
                return
            if behaviour == "404" or len(requests) <= failures:
                self.send_error(404 if behaviour == "404" else 503)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if behaviour == "whole" else body[: len(body) // 2])
            if behaviour == "stalls":
                self.wfile.flush()
                release.wait(30)

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/mnist.pkl.gz", requests
    finally:
        release.set()
        httpd.shutdown()


@contextmanager
def folder_server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A real HTTP server of the files in a folder; yields its address, which ends with a slash, and the requests."""
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *args: object) -> None:
            requests.append(self.path)

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/", requests
    finally:
        httpd.shutdown()
