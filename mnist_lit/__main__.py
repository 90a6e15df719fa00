"""``python -m mnist_lit``."""

import gc


def main() -> None:
    """The command line, its imports as fast as they go.

    They make 600,000 objects that stay. To look for garbage among them, time and again while
    they are made and once more at exit, would take a quarter of what a short run takes.
    """
    gc.disable()
    from mnist_lit import cli

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
