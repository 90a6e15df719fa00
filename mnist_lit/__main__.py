"""``python -m mnist_lit``."""

import atexit
import gc
import sys


def main() -> None:
    """Hand the project's defaults to the engine's command line.

    The imports make 600,000 objects that stay. To search them for garbage again and again while they are
    made, and once more at exit, would take a quarter of the time of a short run.
    """
    if sys.argv[1:2] == ["serve"] and any(arg.endswith(".onnx") for arg in sys.argv):  # without torch
        from mnist_lit.engine import Project, UserError

        try:
            from mnist_lit import serve

            return serve.main(sys.argv[2:], Project("mnist_lit"))
        except UserError as error:
            sys.exit(f"mnist_lit: error: {error}")
    gc.disable()
    from mnist_lit import data, models  # noqa: F401, whose classes the configs call by their names
    from mnist_lit.engine import main as run

    gc.freeze()
    gc.enable()
    if "triton" in sys.modules:  # torch 2.15 imports it, and it reports whatever is not freed at exit
        atexit.register(gc.unfreeze)
    commands = {"new": "mnist_lit.new", "serve": "mnist_lit.serve"}
    run("mnist_lit", "mnist_lit.MNISTDataModule", "configs/cnn.yaml", commands)


if __name__ == "__main__":
    main()
