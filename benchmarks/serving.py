"""``python -m benchmarks.serving --ckpt_path CHECKPOINT``: requests a second, time to the first answer and memory.

Servers and clients share the machine, and the servers take turns; a client sends its next request when it has the
answer to the last one. With ``--soak MINUTES`` one server gets good and hostile requests at once instead, and what is
printed are its status codes, its slowest good answer and its memory. Linux.
"""

import argparse
import asyncio
import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import aiohttp
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.measure import ROOT, described, machine, medians
from mnist_lit.datasets.digits import make_digits

PORT = 8731
SERVERS = {
    "FastAPI by hand": ["benchmarks.plain_server", "{path}.ckpt", f"{PORT}"],
    "serve": ["mnist_lit", "serve", f"--port={PORT}", "--ckpt_path={path}.ckpt"],
    "serve, ONNX": ["mnist_lit", "serve", f"--port={PORT}", "--ckpt_path={path}.onnx"],
}
SECONDS = 3  # of each load
SOAKING = 20  # clients, one in five of them hostile

Sent = tuple[str, bytes]  # content type and body of a request


@contextmanager
def serving(name: str, path: Path, first: Sent) -> Iterator[tuple[int, float]]:
    """Start a server; yields its process and the seconds until its first answer."""
    command = [sys.executable, "-m", *(part.format(path=path.with_suffix("")) for part in SERVERS[name])]
    began = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    try:
        while not asyncio.run(load(1, 0, [[first]])):
            if process.poll() is not None:
                sys.exit(f"{name} failed")
            time.sleep(0.02)
        yield process.pid, time.monotonic() - began
    finally:
        process.terminate()
        process.wait(60)


def memory(pid: int) -> float:
    """Megabytes of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Pss:"))) / 1000


async def load(clients: int, seconds: float, kinds: list[list[Sent]]) -> list[tuple[int, int, float]]:
    """Send requests for so long, but each client at least one; clients of each kind choose among its requests.

    Returns:
        of each answer the kind, the status code and the seconds that it took; nothing if there was no connection.
    """
    answers, until = [], time.monotonic() + seconds

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        kind, choose = number % len(kinds), random.Random(number).choice
        while True:
            (content_type, body), began = choose(kinds[kind]), time.monotonic()
            async with session.post("/predict", data=body, headers={"content-type": content_type}) as answer:
                await answer.read()
            answers.append((kind, answer.status, time.monotonic() - began))
            if time.monotonic() > until:
                return

    async with aiohttp.ClientSession(f"http://127.0.0.1:{PORT}", connector=aiohttp.TCPConnector(limit=0)) as session:
        with suppress(aiohttp.ClientConnectorError):
            await asyncio.gather(*(client(number, session) for number in range(clients)))
    return answers


def png(image: Image.Image) -> bytes:
    """A file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def compare(sent: dict[str, list[Sent]], path: Path, repeats: int) -> Table:
    """Measure the servers in turns."""
    results: dict[str, list] = {name: [] for name in SERVERS}
    for name in [*SERVERS] * repeats:
        with serving(name, path, sent["PNG"][0]) as (pid, start):
            row = {"s to first answer": start}
            for kind, requests in sent.items():
                for clients in (1, 16, 64):
                    asyncio.run(load(clients, 0.5, [requests]))
                    answers = asyncio.run(load(clients, SECONDS, [requests]))
                    assert all(code == 200 for _, code, _ in answers)
                    row[f"{kind}/s, {clients}"] = len(answers) / SECONDS
            results[name].append(row | {"MB": memory(pid)})
    table = Table("median (from, to)", *SERVERS, "serve: ratio")
    rows = {name: medians(measured) for name, measured in results.items()}
    for key in results["serve"][0]:
        cells = [f"{row[key]:.4g} ({row[f'{key}_from']:.4g}, {row[f'{key}_to']:.4g})" for row in rows.values()]
        table.add_row(key, *cells, f"{rows['serve'][key] / rows['FastAPI by hand'][key]:.2f}")
    return table


def soak(good: list[Sent], path: Path, minutes: int) -> Table:
    """Send good requests, and such as a server has to refuse or to survive, at once."""
    large, bomb = png(Image.new("L", (9_000, 5_000), 255)), png(Image.new("1", (20_000, 20_000)))
    texts = b"{", b"[" * 10**5, b'{"images": 3}', b'{"images": ["%%%"]}', b'{"images": [[[1, 2], [3]]]}', b"[]," * 10**6
    hostile = [("image/png", file) for file in (b"", good[0][1][:40], large, bomb, bytes(2**25))]
    hostile += [("application/json", text) for text in texts]
    hostile += [("multipart/form-data", good[0][1]), ("multipart/form-data; boundary=b", good[0][1])]
    table = Table("s", "MB", "slowest good answer, s", "status codes")
    with serving("serve", path, good[0]) as (pid, _):
        for minute in range(1, 1 + minutes):
            answers = asyncio.run(load(SOAKING, 60, [hostile, good, good, good, good]))
            slowest, codes = max(took for kind, _, took in answers if kind), Counter(code for _, code, _ in answers)
            table.add_row(str(60 * minute), f"{memory(pid):.0f}", f"{slowest:.2f}", str(dict(sorted(codes.items()))))
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--ckpt_path", required=True, type=Path, help="a checkpoint, with its ONNX file beside it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--soak", type=int, metavar="MINUTES", help="good and hostile requests at once instead")
    options = parser.parse_args()
    about, path = machine(), options.ckpt_path.resolve()
    images = make_digits()["test"][0][:200]  # uint8 (200, 28, 28)
    sent = {
        "PNG": [("image/png", png(Image.fromarray(image))) for image in images],
        "JSON": [("application/json", json.dumps({"images": [image.tolist()]}).encode()) for image in images],
    }
    good = [*sent["PNG"], *sent["JSON"]]
    table = soak(good, path, options.soak) if options.soak else compare(sent, path, options.repeats)
    Console(width=140).print(table, described(about))


if __name__ == "__main__":
    main()
