"""``python -m mnist_lit``."""

from mnist_lit.cli import main

if __name__ == "__main__":
    main()
