"""What every model config in configs/ has to do: overfit, resume bit for bit, predict, export."""

from mnist_lit.engine.testing import ProjectSuite


class TestProject(ProjectSuite):
    package = "project_name"
