"""A server of datasets, well behaved or not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def server(behaviour: str, body: bytes = b"") -> Iterator[tuple[str, list[str]]]:
    """A real HTTP server on this machine; yields its address and the list of requests it had."""
    requests: list[str] = []
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            if behaviour == "404":
                self.send_error(404)
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
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/mnist.pkl.gz", requests
    finally:
        release.set()
        httpd.shutdown()
