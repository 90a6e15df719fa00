"""``python -m benchmarks.serving --ckpt_path CHECKPOINT``: requests per second, latency, cold start and memory.

Servers and clients share the machine; a client sends its next request when it has the answer to the last one. The
servers take turns. With ``--soak MINUTES`` one server gets good and bad requests at once for as long, and what is
printed are its status codes and its memory. Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from benchmarks.measure import ROOT, Result, described, machine, medians
from mnist_lit.datasets.digits import make_digits

SERVE = ["-m", "mnist_lit", "serve", "--port={port}", "--ckpt_path={path}"]
ALONE = "--max_batch_size=1"
# By name: the kind of file, and the command.
SERVERS = {
    "FastAPI by hand": (".ckpt", ["-m", "benchmarks.plain_server", "{path}", "{port}"]),
    "serve": (".ckpt", SERVE),
    "serve, no batches": (".ckpt", [*SERVE, ALONE]),
    "serve, ONNX": (".onnx", SERVE),
    "serve, ONNX, no batches": (".onnx", [*SERVE, ALONE]),
}
CLIENTS = 1, 16, 64
SOAKING = 20  # clients, one in five of them with bad requests
PATIENCE = aiohttp.ClientTimeout(120)
HEADERS = {"picture": {"content-type": "image/png"}, "pixels": {"content-type": "application/json"}}


class Sent(NamedTuple):
    """A request."""

    headers: dict[str, str]
    body: bytes


class Serving(NamedTuple):
    """A server that runs."""

    url: str
    group: int  # its processes' session
    cold_start: float  # seconds from its start to its first answer


@contextmanager
def serving(name: str, path: Path, first: Sent) -> Iterator[Serving]:
    """Start a server, and wait for its answer to a first request."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port = tried.getsockname()[1]
    suffix, command = SERVERS[name]
    filled = [sys.executable, *(part.format(path=path.with_suffix(suffix), port=port) for part in command)]
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            filled, cwd=path.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}/predict"
            while not asyncio.run(_answers(url, first)):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{shlex.join(filled)} failed:\n{log.read().decode()}")
                time.sleep(0.02)
            yield Serving(url, process.pid, time.monotonic() - began)
        finally:
            process.terminate()
            process.wait(60)
            for pid in _processes(process.pid):
                os.kill(pid, signal.SIGKILL)


async def _answers(url: str, sent: Sent) -> bool:
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=sent.body, headers=sent.headers) as answer,
        ):
            return answer.status == 200
    except aiohttp.ClientConnectionError:
        return False


def _processes(group: int) -> list[int]:
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    found = []
    for pid in pids:
        try:
            if os.getsid(pid) == group:
                found.append(pid)
        except ProcessLookupError:
            continue
    return found


def memory(group: int) -> dict[int, int]:
    """Bytes of each process of a server; what several of them share counts in parts."""
    used = {}
    for pid in _processes(group):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        except (OSError, ProcessLookupError):
            continue
        used[pid] = 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))
    return used


async def load(url: str, clients: int, seconds: float, kinds: list[list[Sent]]) -> tuple[list[float], Counter]:
    """Send requests for so long; the clients share the kinds of requests, and choose among those of a kind.

    Returns:
        Seconds that each answer took, and how many had which status code.
    """
    took: list[float] = []
    codes: Counter = Counter()
    until = time.monotonic() + seconds

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        requests, choose = kinds[number % len(kinds)], random.Random(number).choice
        while (began := time.monotonic()) < until:
            sent = choose(requests)
            async with session.post(url, data=sent.body, headers=sent.headers, timeout=PATIENCE) as answer:
                await answer.read()
            took.append(time.monotonic() - began)
            codes[answer.status] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(number, session) for number in range(clients)))
    return took, codes


def pictures() -> dict[str, list[Sent]]:
    """The same digits as PNG files, and as JSON with their pixels."""
    images = make_digits()[2][0][:200, 0].numpy()  # uint8 (200, 28, 28)
    sent: dict[str, list[Sent]] = {"picture": [], "pixels": []}
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        sent["picture"].append(Sent(HEADERS["picture"], file.getvalue()))
        sent["pixels"].append(Sent(HEADERS["pixels"], json.dumps({"image": image.tolist()}).encode()))
    return sent


def bad(good: bytes) -> list[Sent]:
    """Requests that a server has to refuse."""
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    bodies = [b"", good[:40], b"\x89PNG" + bytes(1000), bomb.getvalue(), random.Random(1).randbytes(5000), bytes(2**25)]
    texts = [b"{", b"[" * 10**5, b'{"images": 3}', b'{"image": "%%%"}', b'{"image": [[1, 2], [3]]}']
    kinds = ["text/html", "multipart/form-data", "multipart/form-data; boundary=b"]
    return [
        *(Sent(HEADERS["picture"], body) for body in bodies),
        *(Sent(HEADERS["pixels"], text) for text in texts),
        *(Sent({"content-type": kind}, good) for kind in kinds),
    ]


def compare(path: Path, repeats: int, seconds: float, console: Console) -> None:
    """Prints a table for each kind of request."""
    sent = pictures()
    first = sent["picture"][0]
    results: dict[tuple[str, str, int], list[Result]] = {}
    starts: dict[str, list[Result]] = {}
    for name in track([*SERVERS] * repeats, "servers", console=console, transient=True):
        with serving(name, path, first) as server:
            sizes = sorted(memory(server.group).values())
            start: Result = {"start": server.cold_start, "memory": float(sum(sizes)), "largest": float(sizes[-1])}
            starts.setdefault(name, []).append(start)
            for kind, requests in sent.items():
                for clients in CLIENTS:
                    asyncio.run(load(server.url, clients, 0.5, [requests]))
                    took, codes = asyncio.run(load(server.url, clients, seconds, [requests]))
                    if set(codes) != {200}:
                        sys.exit(f"{name}: status codes {dict(codes)}")
                    cuts = statistics.quantiles(took, n=100)
                    row = {"rate": len(took) / seconds, "p50": 1000 * cuts[49], "p99": 1000 * cuts[98]}
                    results.setdefault((kind, name, clients), []).append(row)
    for kind in sent:
        right = [
            Column(head, justify="right") for clients in CLIENTS for head in (f"{clients}: requests/s", "p50/p99 ms")
        ]
        table = Table("server", *right, title=f"{kind} at {', '.join(map(str, CLIENTS))} clients")
        for name in SERVERS:
            cells = []
            for clients in CLIENTS:
                row = medians(results[kind, name, clients])
                cells += [f"{row['rate']:.0f} ({row['rate_from']:.0f} to {row['rate_to']:.0f})"]
                cells += [f"{row['p50']:.0f}/{row['p99']:.0f}"]
            table.add_row(name, *cells)
        console.print(table)
    columns = ("s to first answer", "MB in all", "MB of the largest process")
    table = Table("server", *(Column(head, justify="right") for head in columns), title="start and memory")
    for name, measured in starts.items():
        row = medians(measured)
        spread = f"{row['start']:.1f} ({row['start_from']:.1f} to {row['start_to']:.1f})"
        table.add_row(name, spread, f"{row['memory'] / 1e6:.0f}", f"{row['largest'] / 1e6:.0f}")
    console.print(table)


def soak(path: Path, minutes: float, console: Console) -> None:
    """Prints the status codes of good and bad requests, and the memory after the first minute and at the end."""
    sent = pictures()
    good = [*sent["picture"], *sent["pixels"]]
    refused = bad(sent["picture"][0].body)
    with serving("serve", path, good[0]) as server:
        codes: Counter = Counter()
        after: list[tuple[float, int]] = []
        began = time.monotonic()
        for _ in track(range(max(2, round(minutes))), "minutes", console=console, transient=True):
            _, new = asyncio.run(load(server.url, SOAKING, 60, [refused, good, good, good, good]))
            codes += new
            after.append((time.monotonic() - began, sum(memory(server.group).values())))
        for seconds, size in after:
            console.print(f"after {seconds:4.0f} s: {size / 1e6:.0f} MB")
        console.print(f"status codes: {dict(sorted(codes.items()))}; last to first: {after[-1][1] / after[0][1]:.3f}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint; its ONNX file is beside it, or is exported")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each load")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="good and bad requests at once instead")
    options = parser.parse_args()
    path, console, about = Path(options.ckpt_path).resolve(), Console(width=140), machine()
    if not path.exists():
        parser.error(f"{path}: no such file")
    if options.soak:
        soak(path, options.soak, console)
    else:
        if not path.with_suffix(".onnx").exists():
            command = [sys.executable, "-m", "mnist_lit", "export", "--ckpt_path", str(path)]
            subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        compare(path, options.repeats, options.seconds, console)
        console.print(f"medians of {options.repeats}")
    console.print(described(about))


if __name__ == "__main__":
    main()
