"""What every model config in configs/ has to do, with the suite that a new project inherits."""

from mnist_lit.engine.testing import ProjectSuite


class TestProject(ProjectSuite):
    package = "mnist_lit"
    options = ("--data.dataset=digits",)
