"""``python -m mnist_lit``."""

import gc


def main() -> None:
    """Hand the project's defaults to the engine's command line.

    The imports make 600,000 objects that stay. To search them for garbage again and again while they are
    made, and once more at exit, would take a quarter of the time of a short run.
    """
    gc.disable()
    from mnist_lit import data, models  # noqa: F401, whose classes the configs call by their names
    from mnist_lit.engine import cli

    gc.freeze()
    gc.enable()
    cli.main("mnist_lit.MNISTDataModule", "configs/cnn.yaml", commands={"new": "mnist_lit.new"})


if __name__ == "__main__":
    main()
