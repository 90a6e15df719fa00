"""A checkpoint, and an ONNX file of it, behind HTTP: the real server, real requests, real Chromium."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import requests
import yaml
from browser import CHROMIUM, arc, browser, draw
from common import CONFIGS, ENVIRONMENT, OVERLAYS, RUN, Run, assert_one_message, predictions
from PIL import Image
from tags import pictures
from test_folders import CLASSES, make_pets

from mnist_lit.datasets.digits import make_digits

pytest.importorskip("fastapi", reason="needs the extra [serve]")

BEST = RUN / "checkpoints" / "best.ckpt"


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


class Started(NamedTuple):
    address: str
    process: subprocess.Popen
    temporary: Path  # its folder for temporary files, and where a program called gs would leave a file


@contextmanager
def server(folder: Path, *args: object, uvicorn: bool = False) -> Iterator[Started]:
    """``serve`` with these arguments, by itself or in two workers of uvicorn."""
    port, arguments = free_port(), list(map(str, args))
    command = ["mnist_lit", "serve", *arguments]
    if uvicorn:
        command = ["uvicorn", "--factory", "mnist_lit.serve:app", "--workers=2"]
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryFile() as log:
        programs = Path(temporary, "bin")
        programs.mkdir()
        (programs / "gs").write_text(f"#!/bin/sh\ntouch {temporary}/started\n")
        (programs / "gs").chmod(0o755)
        path = f"{programs}:{os.environ['PATH']}"
        process = subprocess.Popen(
            [sys.executable, "-m", *command, f"--port={port}"],
            cwd=folder,
            env=ENVIRONMENT | {"TMPDIR": temporary, "PATH": path, "SERVE": shlex.join(arguments)},
            stdout=log,
            stderr=log,
        )
        try:
            for _ in range(600):
                try:
                    if requests.get(f"http://127.0.0.1:{port}/health", timeout=60).ok:
                        break
                except requests.ConnectionError:
                    pass
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode())
                time.sleep(0.1)
            yield Started(f"http://127.0.0.1:{port}", process, Path(temporary))
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def run_folder(cli_in: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fast.yaml on the digits with best.ckpt and best.onnx, and 1,000 images."""
    folder = tmp_path_factory.mktemp("served")
    cli_in(folder, "fit", "--config", CONFIGS / "fast.yaml", "--data.dataset=digits", "--trainer.max_epochs=4")
    cli_in(folder, "export", "--ckpt_path", BEST)
    (folder / "digits").mkdir()
    images = make_digits()["test"][0][:1000]
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / "digits" / f"{index:04}.png")
    return folder


@pytest.fixture(scope="module", params=["ckpt", "onnx"])
def served(request: pytest.FixtureRequest, run_folder: Path) -> Iterator[Started]:
    with server(run_folder, "--ckpt_path", BEST.with_suffix(f".{request.param}")) as started:
        yield started


def rows(answer: requests.Response) -> list[dict]:
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


def post(address: str, paths: list[Path]) -> list[dict]:
    """The answers to one form of files."""
    form = [("files", (path.name, path.read_bytes())) for path in paths]
    return rows(requests.post(f"{address}/predict", files=form, timeout=60))


def predicted(folder: Path, run: str) -> tuple[list[dict[str, str]], np.ndarray]:
    """The rows of a run's predictions.csv, and what is predicted in each."""
    table = predictions(folder / "lightning_logs" / run)
    return table, np.array([[float(v) for k, v in row.items() if k.startswith(("p_", "prediction"))] for row in table])


@pytest.mark.slow
def test_probabilities_are_those_of_predict(served: Started, run_folder: Path, cli_in: Run) -> None:
    name = f"predicted-{served.process.pid}"
    cli_in(run_folder, "predict", "--ckpt_path", BEST, "--data.images", "digits", f"--run_name={name}")
    table, expected = predicted(run_folder, name)
    files = [run_folder / row["file"] for row in table]
    batches = [post(served.address, files[start : start + 100]) for start in range(0, len(files), 100)]
    url = f"{served.address}/predict"
    alone = [rows(requests.post(url, data=path.read_bytes(), timeout=60))[0] for path in files[:200]]
    for found in (sum(batches, []), alone):
        ours = np.array([list(row["probabilities"].values()) for row in found])
        assert np.abs(ours - expected[: len(ours)]).max() <= 1e-5 + 5e-7  # the table's sixth digit is rounded
        assert [row["class"] for row in found] == [row["class"] for row in table[: len(found)]]


@pytest.mark.slow
def test_every_kind_of_request_has_the_same_answer(served: Started, run_folder: Path) -> None:
    path, url = run_folder / "digits" / "0003.png", f"{served.address}/predict"
    text = b64encode(path.read_bytes()).decode()
    form = post(served.address, [path, path])
    assert [row["name"] for row in form] == [path.name] * 2
    seen = rows(requests.post(f"{url}?input=true", data=path.read_bytes(), timeout=60))[0]["input"]
    image = np.asarray(Image.open(io.BytesIO(b64decode(seen.partition(",")[2]))))
    assert image.shape == (28, 28)
    for body in ({"image": text}, {"images": [f"data:image/png;base64,{text}"] * 3}, {"image": image.tolist()}):
        for row in rows(requests.post(url, json=body, timeout=60)):
            assert row["probabilities"] == pytest.approx(form[0]["probabilities"], abs=1e-6)
    with ThreadPoolExecutor(16) as clients:  # which are computed together
        together = list(clients.map(lambda _: post(served.address, [path])[0]["probabilities"], range(100)))
    assert all(found == pytest.approx(form[0]["probabilities"], abs=1e-6) for found in together)
    schema = requests.get(f"{served.address}/openapi.json", timeout=60).json()
    assert "application/json" in schema["paths"]["/predict"]["post"]["requestBody"]["content"]


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
def test_hostile_requests_are_refused_with_one_sentence(served: Started, run_folder: Path) -> None:
    address, process, temporary = served
    good = (run_folder / "digits" / "0000.png").read_bytes()
    before = set(temporary.rglob("*")), set(run_folder.rglob("*"))
    waits, programs, done = list[float](), set[str](), threading.Event()

    def somebody_else() -> None:
        while not done.is_set():
            began = time.monotonic()
            assert rows(requests.post(f"{address}/predict", data=good, timeout=60))
            waits.append(time.monotonic() - began)
            programs.update(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(somebody_else)
        try:
            for kind, body in hostile(np.random.default_rng(1), good):
                answer = requests.post(f"{address}/predict", data=body, headers={"content-type": kind}, timeout=60)
                assert 400 <= answer.status_code < 500, (kind, body[:100], answer.text)
                assert "\n" not in answer.json()["detail"]
                assert not re.search(r"Traceback|/\w+/|0x", answer.text), answer.text
        finally:
            done.set()
        other.result()
    assert max(waits) < 5
    assert not programs
    assert rows(requests.post(f"{address}/predict", data=good, timeout=60))
    assert process.poll() is None
    assert (set(temporary.rglob("*")), set(run_folder.rglob("*"))) == before


HOSTS = {
    "127.0.0.1": 200,
    "localhost:80": 200,
    "[::1]:8000": 200,
    "10.1.2.3:8000": 200,
    "evil.example": 421,
    "127.0.0.1.evil.example:8000": 421,
    "": 421,
    "[": 421,
}


@pytest.mark.slow
def test_only_own_host_names_are_answered(served: Started, run_folder: Path) -> None:
    with server(run_folder, "--ckpt_path", BEST.with_suffix(".onnx"), "--host=0.0.0.0") as (everywhere, *_):
        for address in (served.address, everywhere):
            for host, status in {**HOSTS, socket.gethostname(): 200}.items():
                for path in ("/", "/info", "/openapi.json"):
                    answer = requests.get(f"{address}{path}", headers={"host": host}, timeout=60)
                    assert answer.status_code == status, (host, path, answer.text)
            assert requests.get(f"{address}/docs", timeout=60).status_code == 404


@pytest.mark.slow
def test_clients_that_hang_keep_nobody_waiting(served: Started, run_folder: Path) -> None:
    address = served.address
    host, port = "127.0.0.1", int(address.rpartition(":")[2])
    good = (run_folder / "digits" / "0000.png").read_bytes()
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(good)}\r\n\r\n".encode()
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((host, port), 60)) for _ in range(100)]
        for client in clients:
            client.sendall(head + good[:100])
        began = time.monotonic()
        assert rows(requests.post(f"{address}/predict", data=good, timeout=10))
        for client in clients:
            assert client.recv(2**16).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 60
    assert rows(requests.post(f"{address}/predict", data=good, timeout=60))


@pytest.mark.slow
def test_sigterm_finishes_what_is_under_way(run_folder: Path, tmp_path: Path) -> None:
    """Of a run that was trained on four GPUs, and is served without one."""
    shutil.copytree(run_folder / BEST.parents[1], tmp_path / BEST.parents[1])
    recorded = tmp_path / BEST.parents[1] / "config.yaml"
    config = yaml.safe_load(recorded.read_text())
    config["trainer"] |= {"accelerator": "gpu", "devices": 4, "strategy": "ddp"}
    recorded.write_text(yaml.safe_dump(config))
    paths = sorted((run_folder / "digits").iterdir())[:400]
    form = [("files", (path.name, path.read_bytes())) for path in paths]
    with server(tmp_path, "--config", recorded, "--ckpt_path", BEST) as (address, process, _):
        body = requests.Request("POST", f"{address}/predict", files=form).prepare()
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
            kind = body.headers["content-type"]
            head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n"
            client.sendall(f"{head}Content-Length: {len(body.body)}\r\n\r\n".encode() + body.body)
            time.sleep(0.5)
            process.terminate()
            answer = b""
            while part := client.recv(2**20):
                answer += part
        assert process.wait(60) == 0
    assert answer.startswith(b"HTTP/1.1 200")
    assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"]) == 400


@pytest.mark.slow
@pytest.mark.parametrize("uvicorn", [False, True])
def test_onnx_needs_no_torch_and_may_be_overwritten(run_folder: Path, tmp_path: Path, uvicorn: bool) -> None:
    path, image = tmp_path / "copy.onnx", (run_folder / "digits" / "0000.png").read_bytes()
    path.write_bytes((run_folder / BEST.with_suffix(".onnx")).read_bytes())
    with server(tmp_path, "--ckpt_path=copy.onnx", "--num_threads=1", uvicorn=uvicorn) as (address, process, _):
        expected = requests.post(f"{address}/predict", data=image, timeout=60).json()
        assert expected["model"]["digest"] == sha256(path.read_bytes()).hexdigest()
        path.write_text("another one")
        assert requests.post(f"{address}/predict", data=image, timeout=60).json() == expected
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2 if uvicorn else not children
        for pid in (str(process.pid), *children):
            assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_mistake_is_one_message(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_text("no")
    reason = "no.onnx is not an ONNX file" if find_spec("onnxruntime") else "onnxruntime not installed: pip install"
    assert_one_message(cli("serve", "--ckpt_path=no.onnx", ok=False), reason)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_page_recognizes_what_is_drawn_and_dropped(served: Started, run_folder: Path) -> None:
    address = served.address
    with browser() as page:
        page.set_viewport_size({"width": 390, "height": 844})  # a phone's
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#hint").is_visible()
        draw(page, (0.52, 0.2), (0.5, 0.8))
        page.locator("#bars li.best .name", has_text="1").wait_for()
        assert not page.locator("#hint").is_visible()
        assert len({line.bounding_box()["height"] for line in page.locator("#bars li").all()}) == 1
        draw(page, *arc(0.5, 0.5, 0.28, 0, 1))
        page.locator("#bars li.best .name", has_text="0").wait_for()
        assert page.locator("#input").get_attribute("src").startswith("data:image/png")
        page.locator("#file").set_input_files(run_folder / "digits" / "0003.png")
        expected = post(address, [run_folder / "digits" / "0003.png"])[0]["class"]
        page.locator("#bars li.best .name", has_text=expected).wait_for()
        assert all(url.startswith((address, "data:", "blob:")) for url in asked)


@pytest.mark.slow
def test_colour_bfloat16_and_workers_in_a_folder_with_brackets(cli_in: Run, tmp_path: Path) -> None:
    folder = tmp_path / "a b [c]"
    pets = make_pets(folder / "pets", 40, (40, 50))
    fit = ("fit", "--config", CONFIGS / "fast.yaml", "--data.dataset=pets", "--data.image_size=32")
    cli_in(
        folder,
        *fit,
        "--data.batch_size=16",
        "--trainer.max_epochs=3",
        "--trainer.precision=bf16-mixed",
        "--run_name=my [run]",
    )
    best = "lightning_logs/my [run]/checkpoints/best.ckpt"
    files = [pets / name / "0000.png" for name in CLASSES]
    cli_in(folder, "predict", "--ckpt_path", best, "--data.images", *files, "--run_name=predicted")
    _, expected = predicted(folder, "predicted")
    with server(folder, "--ckpt_path", best, uvicorn=True) as (address, *_):
        found = post(address, files)
        assert np.allclose([list(row["probabilities"].values()) for row in found], expected, rtol=0, atol=1e-6)
        assert [row["class"] for row in found] == list(CLASSES)
        assert not requests.get(f"{address}/info", timeout=60).json()["draws"]


@pytest.mark.slow
def test_regression_is_served_as_values(cli: Run, small: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(small))
    for split in ("train", "valid", "test"):
        arrays[f"y_{split}"] = arrays[f"x_{split}"].mean((1, 2), dtype=np.float32) / 128
    np.savez(tmp_path / "bright.npz", **arrays)
    configs = (f"--config={CONFIGS / 'fast.yaml'}", f"--config={OVERLAYS / 'regression.yaml'}")
    cli("fit", *configs, "--data.dataset=bright.npz", "--data.batch_size=128", "--trainer.max_epochs=1")
    cli("predict", "--ckpt_path", BEST)
    expected = predicted(tmp_path, "version_1")[1][:20]
    with server(tmp_path, "--ckpt_path", BEST, "--num_threads=1", "--data.split_seed", "-3") as (address, *_):
        body = {"images": arrays["x_test"][:20].tolist()}
        found = rows(requests.post(f"{address}/predict", json=body, timeout=60))
    assert np.allclose([row["values"] for row in found], expected, rtol=0, atol=1e-6)
    assert all(row["class"] is row["probabilities"] is row["confidence"] is None for row in found)


@pytest.mark.slow
def test_several_labels_and_batches_of_dicts(cli: Run, tmp_path: Path) -> None:
    images = {"images": pictures().tolist()}
    for dicts in (False, True):
        name = f"dicts-{dicts}".lower()
        data = ("--data=tags.Tags", f"--data.dicts={dicts}".lower())
        cli("fit", "--model=tags.Tagger", *data, "--trainer.max_epochs=1", f"--run_name={name}")
        last = f"lightning_logs/{name}/checkpoints/last.ckpt"
        cli("predict", "--ckpt_path", last, f"--run_name={name}-predicted")
        _, expected = predicted(tmp_path, f"{name}-predicted")
        if dicts:
            refused = cli("serve", "--ckpt_path", last, ok=False)
            assert_one_message(refused, "Tagger", "TypeError", f"python -m mnist_lit export --ckpt_path {last}")
            cli("export", "--ckpt_path", last)
            last = last.replace(".ckpt", ".onnx")
        with server(tmp_path, "--ckpt_path", last) as (address, *_):
            found = rows(requests.post(f"{address}/predict", json=images, timeout=60))
        assert np.allclose([row["values"] for row in found], expected, rtol=0, atol=1e-5)
        assert all(row["class"] is None for row in found)
