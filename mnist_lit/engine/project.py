"""The project that runs: its name and its defaults."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Project:
    """A package whose ``__main__`` calls ``main``.

    Args:
        name: name of the package, as in ``python -m NAME``.
        data_module: import path of the data module to use if the config names none.
        default_config: config that ``fit`` uses if it exists and the command names neither a config nor a model.
        commands: further commands, with the module whose ``main(args, project)`` runs each.

    Example:
        >>> Project("leaf_id").command("fit", "--config", "my configs/cnn.yaml")
        "python -m leaf_id fit --config 'my configs/cnn.yaml'"
    """

    name: str
    data_module: str = ""
    default_config: str = ""
    commands: Mapping[str, str] = field(default_factory=dict)

    def command(self, *args: object) -> str:
        """A command of this project, as one would type it."""
        return shlex.join(["python", "-m", self.name, *map(str, args)])
