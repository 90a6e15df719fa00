"""A checkpoint, and an ONNX file of it, behind HTTP: the real server, real requests, real Chromium."""

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import requests
import yaml
from browser import CHROMIUM, arc, browser, draw
from common import CONFIGS, ENVIRONMENT, OVERLAYS, RUN, Run, assert_one_message, predictions
from PIL import Image
from requests.adapters import HTTPAdapter
from tags import pictures
from test_folders import CLASSES, make_pets
from urllib3 import Retry

from mnist_lit.datasets.digits import make_digits

pytest.importorskip("fastapi", reason="needs the extra [serve]")

BEST = RUN / "checkpoints" / "best.ckpt"
ONNX = BEST.with_suffix(".onnx")
only_onnx = pytest.mark.parametrize("served", [ONNX], indirect=True, ids=["onnx"])


class Started(NamedTuple):
    port: int
    process: subprocess.Popen

    def ask(self, method: str, path: str, **options: object) -> requests.Response:
        return requests.request(method, f"http://127.0.0.1:{self.port}/{path}", timeout=60, **options)  # type: ignore[arg-type]

    def predict(self, path: str = "predict", **options: object) -> list[dict]:
        answer = self.ask("POST", path, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]


@contextmanager
def server(folder: Path, *args: object, uvicorn: bool = False, **environment: str) -> Iterator[Started]:
    """``serve`` with these arguments, by itself or in two workers of uvicorn."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port = tried.getsockname()[1]
    command = ["mnist_lit", "serve", *map(str, args)]
    if uvicorn:
        command = ["uvicorn", "--factory", "mnist_lit.serve:app", "--workers=2"]
        environment["SERVE"] = shlex.join(map(str, args))
    arguments = [sys.executable, "-m", *command, f"--port={port}"]
    with subprocess.Popen(arguments, cwd=folder, env=ENVIRONMENT | environment) as process, requests.Session() as first:
        try:
            first.mount("http://", HTTPAdapter(max_retries=Retry(600, backoff_factor=0.1, backoff_max=0.1)))
            first.get(f"http://127.0.0.1:{port}/health", timeout=60).raise_for_status()
            yield Started(port, process)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def folder(cli_in: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fast.yaml on the digits with best.ckpt and best.onnx, and 400 images with their predictions."""
    folder = tmp_path_factory.mktemp("served")
    cli_in(folder, "fit", "--config", CONFIGS / "fast.yaml", "--data.dataset=digits", "--trainer.max_epochs=4")
    cli_in(folder, "export", "--ckpt_path", BEST)
    (folder / "digits").mkdir()
    for index, image in enumerate(make_digits()["test"][0][:400]):
        Image.fromarray(image).save(folder / "digits" / f"{index:03}.png")
    cli_in(folder, "predict", "--ckpt_path", BEST, "--data.images", "digits", "--run_name=predicted")
    (folder / "bin").mkdir()
    (folder / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {folder}/started\n")  # which Pillow starts for EPS
    (folder / "bin" / "gs").chmod(0o755)
    return folder


@pytest.fixture(scope="module", params=[BEST, ONNX], ids=["ckpt", "onnx"])
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[Started]:
    places = {"TMPDIR": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    with server(folder, "--ckpt_path", request.param, "--allowed_hosts", "10.1.2.3", "my.net", **places) as started:
        yield started


def form(paths: list[Path]) -> dict[str, list]:
    return {"files": [("files", (path.name, path.read_bytes())) for path in paths]}


def probabilities(rows: list[dict]) -> np.ndarray:
    return np.array([list(row["probabilities"].values()) for row in rows])


@pytest.mark.slow
def test_every_kind_of_request_is_answered_as_predict_does(served: Started, folder: Path) -> None:
    table, paths = predictions(folder / "lightning_logs" / "predicted"), sorted((folder / "digits").iterdir())
    expected = np.array([[row[f"p_{digit}"] for digit in range(10)] for row in table], float)
    images = [path.read_bytes() for path in paths[:100]]
    texts = [f"data:image/png;base64,{b64encode(image).decode()}" for image in images]
    pixels = [served.predict("predict?by=page&input=true", data=image)[0]["input"] for image in images[:3]]
    with ThreadPoolExecutor(16) as clients:  # which are computed together
        alone = sum(clients.map(lambda image: served.predict(data=image), images), [])
    uploaded = served.predict(**form(paths))
    assert [row["name"] for row in uploaded] == [path.name for path in paths]
    for rows in (uploaded, alone, *(served.predict(json={"images": sent}) for sent in (texts, pixels))):
        assert np.abs(probabilities(rows) - expected[: len(rows)]).max() <= 1e-5 + 5e-7  # the table has six digits
        assert [row["class"] for row in rows] == [row["class"] for row in table[: len(rows)]]


def hostile(rng: np.random.Generator, good: bytes) -> Iterator[tuple[str, bytes]]:
    """Content types and bodies of 200 requests that have to be refused."""
    bomb, program = io.BytesIO(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    for body in (b"", bomb.getvalue(), program, bytes(100_000_000)):
        yield "image/png", body
    images = """3 [] [{}] null {} ["%%%"] [[]] [[[1,2],[3]]] [[[1e999]]] [[["1"]]] [[[true]]] [[-1]]""".split()
    images += ["[[[" + "9" * 5000 + "]]]", "[" + "[]," * (5 * 2**20) + "[]]", '["' + b64encode(program).decode() + '"]']
    images += [f"[[{[256] * 28}{f', {[0] * 28}' * 27}]]", f"{[''] * 1001}".replace("'", '"')]
    for text in ["", "{", "[]", "{}", "[" * 10**5, *(f'{{"images": {text}}}' for text in images)]:
        yield "application/json", text.encode()
    kinds = ["image/png", "application/json", "multipart/form-data; boundary=b", "text/html", "", "multipart/form-data"]
    for _ in range(200 - 4 - 5 - len(images)):
        cut, kind = int(rng.integers(1, len(good) // 2)), str(rng.choice(kinds))
        yield kind, [good[:cut], rng.bytes(cut), b"--b\r\n" + good[:cut]][rng.integers(3)]


@pytest.mark.slow
@only_onnx
def test_hostile_requests_are_refused_with_one_sentence(served: Started, folder: Path) -> None:
    good, before = (folder / "digits" / "000.png").read_bytes(), set(folder.rglob("*"))
    with ThreadPoolExecutor(1) as somebody_else:
        for kind, body in hostile(np.random.default_rng(1), good):
            other = somebody_else.submit(served.predict, data=good)
            answer = served.ask("POST", "predict", data=body, headers={"content-type": kind})
            assert 400 <= answer.status_code < 500, (kind, body[:100], answer.text)
            assert "\n" not in answer.json()["detail"]
            assert not re.search(r"Traceback|/\w+/|0x", answer.text), answer.text
            assert other.result(5)
    assert served.ask("POST", "predict", data=iter([good])).status_code == 413  # in chunks, nobody knows how many
    assert served.process.poll() is None
    assert set(folder.rglob("*")) == before


HOSTS = {
    **dict.fromkeys(("127.0.0.1", "localhost:80", "[::1]:8000", "10.1.2.3:8000", "my.net", socket.gethostname()), 200),
    **dict.fromkeys(("evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example", "", "["), 400),
}


@pytest.mark.slow
@only_onnx
def test_only_own_host_names_are_answered(served: Started) -> None:
    for host, status in HOSTS.items():
        for path in ("", "health", "openapi.json"):
            assert served.ask("GET", path, headers={"host": host}).status_code == status, (host, path)
    assert served.ask("GET", "docs").status_code == 404
    requests_taken = served.ask("GET", "openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert "application/json" in requests_taken


def begin(started: Started, body: bytes) -> HTTPConnection:
    """A request of which only the beginning is sent."""
    client = HTTPConnection("127.0.0.1", started.port, timeout=60)
    client.request("POST", "/predict", body[:100], {"Content-Length": str(len(body))})
    return client


@pytest.mark.slow
@only_onnx
def test_clients_that_hang_keep_nobody_waiting(served: Started, folder: Path) -> None:
    good = (folder / "digits" / "000.png").read_bytes()
    clients, began = [begin(served, good) for _ in range(100)], time.monotonic()
    assert served.predict(data=good)
    assert time.monotonic() - began < 10
    assert {client.getresponse().status for client in clients} == {408}
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["ckpt", "onnx"])
def test_overwritten_file_and_sigterm_change_nothing(folder: Path, tmp_path: Path, suffix: str) -> None:
    """Of a run that was trained on four GPUs, and is served without one; an ONNX file is served without torch."""
    shutil.copytree(folder / RUN, tmp_path / RUN)
    config = yaml.safe_load((tmp_path / RUN / "config.yaml").read_text())
    config["trainer"] |= {"accelerator": "gpu", "devices": 4, "strategy": "ddp"}
    (tmp_path / RUN / "config.yaml").write_text(yaml.safe_dump(config))
    path, good = tmp_path / BEST.with_suffix(f".{suffix}"), (folder / "digits" / "000.png").read_bytes()
    options = ("--num_threads=1",) if suffix == "onnx" else ("--config", tmp_path / RUN / "config.yaml")
    with server(tmp_path, "--ckpt_path", path, *options) as started:
        assert started.ask("GET", "health").json()["digest"] == sha256(path.read_bytes()).hexdigest()
        client, expected = begin(started, good), started.predict(data=good)
        path.write_text("another one")
        assert started.predict(data=good) == expected
        assert ("libtorch" in Path(f"/proc/{started.process.pid}/maps").read_text()) == (suffix == "ckpt")
        started.process.terminate()
        with suppress(requests.ConnectionError):
            while started.ask("GET", "health"):  # until nothing more is accepted
                pass
        client.send(good[100:])
        assert json.load(client.getresponse())["predictions"] == expected
        started.process.wait(60)


@pytest.mark.slow
@only_onnx
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_page_recognizes_what_is_drawn_and_dropped(served: Started, folder: Path) -> None:
    with browser() as page:
        page.set_viewport_size({"width": 390, "height": 844})  # a phone's
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address := f"http://127.0.0.1:{served.port}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#hint").is_visible()
        draw(page, (0.52, 0.2), (0.5, 0.8))
        page.locator("#bars li.best .name", has_text="1").wait_for()
        assert not page.locator("#hint").is_visible()
        assert len({line.bounding_box()["height"] for line in page.locator("#bars li").all()}) == 1
        draw(page, *arc(0.5, 0.5, 0.28, 0, 1))
        page.locator("#bars li.best .name", has_text="0").wait_for()
        seen = page.evaluate("[...$('input').getContext('2d').getImageData(0, 0, 28, 28).data]")
        assert {0, 255} <= set(seen[::4])  # red
        page.locator("#file").set_input_files(folder / "digits" / "003.png")
        expected = served.predict(**form([folder / "digits" / "003.png"]))[0]["class"]
        page.locator("#bars li.best .name", has_text=expected).wait_for()
        assert all(url.startswith((address, "data:", "blob:")) for url in asked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["colour in bfloat16", "regression", "several labels", "batches of dicts"])
def test_every_model_is_served_as_predict_predicts(cli_in: Run, small: Path, tmp_path: Path, kind: str) -> None:
    """In a folder with brackets; the first in two workers of uvicorn."""
    folder, dicts, sent = tmp_path / "a b [c]", kind == "batches of dicts", {"json": {"images": pictures().tolist()}}
    fit, asked = ["--model=tags.Tagger", "--data=tags.Tags", f"--data.dicts={json.dumps(dicts)}"], []
    folder.mkdir()
    if colour := kind.startswith("colour"):
        pets = make_pets(folder / "pets", 40, (40, 50))
        fit = [f"--config={CONFIGS / 'fast.yaml'}", "--data.dataset=pets", "--data.image_size=32"]
        fit += ["--data.batch_size=16", "--trainer.precision=bf16-mixed"]
        files = [pets / name / "0000.png" for name in CLASSES]
        asked, sent = ["--data.images", *files], form(files)
    elif kind == "regression":
        arrays = dict(np.load(small))
        for split in ("train", "valid", "test"):
            arrays[f"y_{split}"] = arrays[f"x_{split}"].mean((1, 2), dtype=np.float32) / 128
        np.savez(folder / "bright.npz", **arrays)
        fit = [f"--config={path}" for path in (CONFIGS / "fast.yaml", OVERLAYS / "regression.yaml")]
        fit += ["--data.dataset=bright.npz", "--data.batch_size=128"]
        sent = {"json": {"images": arrays["x_test"][:20].tolist()}}
    cli_in(folder, "fit", *fit, f"--trainer.max_epochs={3 if colour else 1}", "--run_name=my [run]")
    path = Path("lightning_logs/my [run]/checkpoints/best.ckpt")
    cli_in(folder, "predict", "--ckpt_path", path, *asked, "--run_name=predicted")
    if dicts:
        refused = cli_in(folder, "serve", "--ckpt_path", path, ok=False)
        assert_one_message(refused, "Tagger", "TypeError", f"python -m mnist_lit export --ckpt_path '{path}'")
        cli_in(folder, "export", "--ckpt_path", path)
        path = path.with_suffix(".onnx")
    with server(folder, "--ckpt_path", path, "--num_threads=1", uvicorn=colour) as started:
        found = started.predict(**sent)
        assert not (colour and started.ask("GET", "health").json()["draws"])
    table = predictions(folder / "lightning_logs" / "predicted")[: len(found)]
    numbers = [[float(v) for k, v in row.items() if k.startswith(("p_", "prediction"))] for row in table]
    assert np.allclose(probabilities(found) if colour else [row["values"] for row in found], numbers, rtol=0, atol=1e-5)
    assert [row["class"] for row in found] == (list(CLASSES) if colour else [None] * len(found))
    assert colour or all(row["probabilities"] is row["confidence"] is None for row in found)
