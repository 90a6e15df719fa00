"""What editors and shells are told of the configs."""

from __future__ import annotations

import json
import subprocess

import jsonschema
import pytest
import yaml
from common import CONFIGS, Run

pytestmark = pytest.mark.slow  # jsonargparse takes ten seconds to describe every option


@pytest.fixture(scope="module")
def validator(cli_in: Run, tmp_path_factory: pytest.TempPathFactory) -> jsonschema.Draft202012Validator:
    printed = json.loads(cli_in(tmp_path_factory.mktemp("schema"), "fit", "--print_schema").stdout)
    jsonschema.Draft202012Validator.check_schema(printed)
    return jsonschema.Draft202012Validator(printed)


def test_every_config_is_valid(validator, cli: Run) -> None:
    for path in CONFIGS.rglob("*.yaml"):
        if path.stem != "sweep":
            assert list(validator.iter_errors(yaml.safe_load(path.read_text()))) == [], path
    complete = yaml.safe_load(cli("fit", "--config", CONFIGS / "cnn.yaml", "--print_config").stdout)
    assert list(validator.iter_errors(complete)) == []
    own = "{model: {class_path: my.Net, init_args: {n: 3}}, trainer: {callbacks: [{class_path: my.Own}]}}"
    assert list(validator.iter_errors(yaml.safe_load(own))) == []


@pytest.mark.parametrize(
    "config",
    [
        "trainer: {max_epoch: 3}",
        "trainer: {max_epochs: many}",
        "model: {class_path: CNN, init_args: {lrr: 1}}",
        "model: {class_path: FastCNN, init_args: {lr: fast}}",
        "data: {batch_size: large}",
        "data: {batch_sizes: 3}",
        "optimizer: {class_path: SGD, init_args: {lrr: 1}}",
        "models: CNN",
    ],
)
def test_mistakes_are_found(validator, config: str) -> None:
    assert list(validator.iter_errors(yaml.safe_load(config)))


@pytest.mark.parametrize("command", ["python -m mnist_lit", "python3 -m mnist_lit", "mnist-lit"])
def test_bash_completes_commands_and_settings(cli: Run, command: str) -> None:
    script = f"""{cli("fit", "--print_completion").stdout}
    for word in --data.batch --trainer.max_e exp; do
        COMP_WORDS=({command} $word) COMP_CWORD=$(({len(command.split())}))
        COMPREPLY=() && _mnist_lit_complete "${{COMP_WORDS[0]}}" $word && echo "${{COMPREPLY[@]}}"
    done
    COMP_WORDS=(python other.py --data.b) COMPREPLY=()
    _mnist_lit_complete python --data.b && echo "${{COMPREPLY[@]}}"
    complete -p {command.split()[0]}
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    expected = ["--data.batch_size", "--trainer.max_epochs", "export", ""]
    assert done.stdout.splitlines() == [*expected, f"complete -o default -F _mnist_lit_complete {command.split()[0]}"]
