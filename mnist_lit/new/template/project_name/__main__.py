"""``python -m project_name``."""

from mnist_lit.engine import main

if __name__ == "__main__":
    main(
        "project_name",
        data_module="project_name.data.DataModule",
        default_config="configs/cnn.yaml",
    )
