"""``serve``: a checkpoint, or an ONNX file of it, behind HTTP, and a page to try it."""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mnist_lit.engine.errors import ENGINE as PROJECT
from mnist_lit.engine.errors import ConfigurationError, UserError
from mnist_lit.engine.images import ImageReader
from mnist_lit.engine.project import Project

SUFFIX = ".onnx"
# Options of predict that say how a model is made; where it runs is what --devices says.
FURTHER = re.compile(
    r"--(config|data|model|weights_only|num_threads|seed_everything"
    r"|trainer(?!\.(accelerator|devices|logger|num_nodes|strategy)\b))\b"
)


def main(args: list[str], project: Project, reader: Callable[[dict[str, Any]], ImageReader] = ImageReader) -> None:
    """Serve until it is stopped.

    Args:
        args: of the command line.
        project: that runs.
        reader: makes, from the hyperparameters of the model's data module, what reads the pictures that are sent.
    """
    options, others = _parser().parse_known_args(args)
    if unknown := [option for option in others if option.startswith("--") and not FURTHER.match(option)]:
        _parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        _serve(project, options, others, reader)
    except UserError as error:
        sys.exit(f"{PROJECT}: error: {error}")


def _serve(
    project: Project, options: argparse.Namespace, others: list[str], make_reader: Callable[..., ImageReader]
) -> None:
    if missing := [name for name in ("litserve", "python_multipart") if find_spec(name) is None]:
        raise ConfigurationError(f"serve needs {', '.join(missing)}: pip install '{PROJECT}[serve]'")
    from mnist_lit.engine.serving.models import Checkpoint, OnnxFile, Served
    from mnist_lit.engine.serving.server import Server, check_port, stop_on_signals
    from mnist_lit.engine.threads import available_cpus

    check_port(options.host, options.port)
    path = Path(options.ckpt_path).expanduser()
    served: Served
    if path.suffix == SUFFIX:
        if others:
            _parser().error(f"{' '.join(others)}: an ONNX file takes no options of predict")
        served = OnnxFile.open(path, available_cpus(options.workers))
    else:
        served = Checkpoint.open(project, str(path), others)
    try:
        reader = make_reader(served.data)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} does not say how it takes images ({error!r})") from error
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options.host, options.host)
    server = Server(
        served,
        reader,
        f"http://{host}:{options.port}",
        options.max_batch_size,
        options.batch_timeout,
        accelerator="cpu" if path.suffix == SUFFIX else "auto",
        devices=options.devices,
        workers_per_device=options.workers,
        restart_workers=True,
    )
    stop_on_signals()
    try:
        server.run(options.host, options.port, log_level="warning", generate_client_file=False)
    except KeyboardInterrupt:  # while the workers load
        for process in multiprocessing.active_children():
            process.kill()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROJECT} serve",
        description="Serve a model: POST /predict with images, GET / for a page to try it, /docs, /health. Of the "
        "options of predict it takes those that say how a model is made, such as --config, --model.*, --data.* and "
        "--trainer.precision; the config is that of the checkpoint's run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint, or an ONNX file that export has written")
    parser.add_argument("--host", default="127.0.0.1", choices=["127.0.0.1", "0.0.0.0", "::"], help="0.0.0.0: everyone")
    parser.add_argument("--port", type=_number(1024, 65535), default=8000, help="of 1024 to 65535")
    parser.add_argument("--workers", type=_number(1), default=1, help="processes that compute, on each device")
    parser.add_argument("--max_batch_size", type=_number(1), default=16, help="requests that are computed at once")
    parser.add_argument("--batch_timeout", type=_seconds, default=0.0, help="seconds to wait for further requests")
    parser.add_argument("--devices", type=_devices, default="auto", help="number of GPUs; auto: all there are")
    return parser


def _number(least: int, most: int = 2**31) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isdigit() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {least} to {most}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 10:
        raise argparse.ArgumentTypeError(f"{text}: expected seconds, 0 to 10")
    return seconds


def _devices(text: str) -> int | str:
    return text if text == "auto" else _number(1)(text)
