"""``python -m mnist_lit``."""

import gc
import sys


def main() -> None:
    """Hand the project's defaults to the engine's command line.

    The imports make 600,000 objects that stay. To search them for garbage again and again while they are
    made, and once more at exit, would take a quarter of the time of a short run.
    """
    if sys.argv[1:2] == ["serve"] and any(arg.endswith(".onnx") for arg in sys.argv):  # without torch
        from mnist_lit import serve

        return serve.main(sys.argv[2:])
    gc.disable()
    from mnist_lit import data, models  # noqa: F401, whose classes the configs call by their names
    from mnist_lit.engine import cli

    gc.freeze()
    gc.enable()
    commands = {"new": "mnist_lit.new", "serve": "mnist_lit.serve", "folds": "mnist_lit.engine.folds"}
    cli.main("mnist_lit.MNISTDataModule", "configs/cnn.yaml", commands)


if __name__ == "__main__":
    main()
