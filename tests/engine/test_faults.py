"""What goes wrong ends in one message, and nothing that was there before is lost."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import random
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from common import CONFIGS, RUN, Run, assert_one_message, assert_same, checkpoint
from hostile import Calls, hostile
from mirror import server

from mnist_lit.engine.checkpoint import Checkpoint, newest_checkpoint
from mnist_lit.engine.errors import UserError

LAST = RUN / "checkpoints" / "last.ckpt"
QUICK = ("fit", "--config", CONFIGS / "logistic.yaml", "--trainer.log_every_n_steps=4")


@pytest.fixture(scope="module")
def saved(cli_in: Run, tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """The last checkpoint of a run of logistic.yaml."""
    folder = tmp_path_factory.mktemp("saved")
    cli_in(folder, *QUICK, "--data.dataset", small)
    return folder / LAST


# --------------------------------------------------------------------------------------- divergence


def test_divergence_stops_with_the_last_good_checkpoint(cli: Run, small: Path, tmp_path: Path) -> None:
    """A learning rate that is fine for the first epoch of 16 steps and absurd in the second."""
    done = cli(
        *(*QUICK, "--data.dataset", small, "--optimizer=SGD", "--optimizer.lr=0.1"),
        *("--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=1e39"),
        ok=False,
    )
    assert_one_message(done, "the learning rate 1e+38", "lower learning rate")
    assert re.search(r"the loss is (nan|inf) at step 1[78] \(epoch 1\)", done.stderr)
    kept = checkpoint(tmp_path / LAST)
    assert kept["global_step"] == 16
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())
    assert {path.name for path in (tmp_path / LAST).parent.iterdir()} == {"last.ckpt", "best.ckpt"}


# ------------------------------------------------------------------------------ untrusted checkpoints


def as_checkpoint(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def with_pickle(whole: bytes, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The checkpoint with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for member in old.infolist():
            data = pickled if member.filename.endswith("data.pkl") else old.read(member)
            new.writestr(member.filename, data)
    return file.getvalue()


def hostile_checkpoints(whole: bytes, marker: Path) -> dict[str, bytes]:
    touch = f"touch {marker}"
    good = torch.load(io.BytesIO(whole), weights_only=True)
    in_it = {
        "os.system in the weights": {"state_dict": {"w": Calls(os.system, touch)}},
        "eval in the hyperparameters": {
            "hyper_parameters": {"lr": Calls(builtins.eval, f"open({str(marker)!r}, 'w')")}
        },
        "a module": {"state_dict": torch.nn.Linear(2, 2)},
        "weights that are none": {"state_dict": {"net.1.weight": 3}},
        "a step that is none": {"global_step": "many"},
        "torch.load in torch.load": {"state_dict": {"w": Calls(torch.load, str(marker))}},
        "gigabytes": {"state_dict": {"w": Calls(bytearray, 1 << 38)}},
        "a huge tensor": {"state_dict": {"w": Calls(torch.zeros, 1 << 40)}},
    }
    return {
        **{name: as_checkpoint(good | changed) for name, changed in in_it.items()},
        **{f"the pickle {name}": with_pickle(whole, data) for name, data in hostile(marker).items()},
        "a bare pickle": pickle.dumps(Calls(os.system, touch)),
        "the old format": pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(Calls(os.system, touch)),
        "other things": as_checkpoint({"weights": torch.zeros(3)}),
        "a list": as_checkpoint([1, 2, 3]),
        "a text": b"no checkpoint",
        "nothing": b"",
    }


def peak_memory() -> int:
    """In KiB, since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does")
def test_corrupted_checkpoints_never_run_and_are_named(saved: Path, tmp_path: Path) -> None:
    """200 of them: cut, flipped, spliced, and made to harm. Memory grows by less than 64 MiB."""
    whole, chance = saved.read_bytes(), random.Random(1)
    original, marker, path = checkpoint(saved), tmp_path / "executed", tmp_path / "bad.ckpt"
    bad = hostile_checkpoints(whole, marker)
    bad["a bomb"] = with_pickle(whole, bytes(1 << 28), zipfile.ZIP_DEFLATED)
    while len(bad) < 200:
        place, damaged = chance.randrange(len(whole)), bytearray(whole)
        kind = chance.choice(["cut", "flipped", "spliced"])
        if kind == "cut":
            damaged = damaged[:place]
        elif kind == "flipped":
            damaged[place] ^= 1 << chance.randrange(8)
        else:
            source = chance.randrange(len(whole))
            damaged[place : place + 100] = whole[source : source + 100]
        bad[f"{kind} {len(bad)}"] = bytes(damaged)

    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is from now on
    before = peak_memory()
    harmless, messages = 0, []
    for name, data in bad.items():
        path.write_bytes(data)
        try:
            # What is damaged where nothing is read, such as the padding between members, is the original.
            assert_same(Checkpoint.read(path).content, original, name)
            harmless += 1
        except UserError as error:
            messages.append(str(error))
    grown = peak_memory() - before
    print(f"{len(bad)} checkpoints: {len(messages)} refused, {harmless} harmless, {grown} KiB more memory")
    assert not marker.exists()
    assert len(messages) >= 150
    unusable = "cannot be used as a checkpoint .*|is not a checkpoint of Lightning .*"
    named = rf"{path} ({unusable}|holds .*, and to load that may run any code; .* --weights_only=false)"
    assert [message for message in messages if not re.fullmatch(named, message)] == []
    assert grown < 64 * 1024


def test_the_hostile_checkpoints_do_run_elsewhere(saved: Path, tmp_path: Path) -> None:
    """A test of the test: torch.load believes what is refused here."""
    for case in ("os.system in the weights", "eval in the hyperparameters"):
        marker = tmp_path / case.replace(" ", "-")
        torch.load(io.BytesIO(hostile_checkpoints(saved.read_bytes(), marker)[case]), weights_only=False)
        assert marker.exists(), case


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another model", "bad.ckpt is not of this model: net.0.bias has the shape None there"),
        ("other classes", "net.1.bias has the shape (7,) there and (10,) in Logistic"),
        ("truncated", "bad.ckpt cannot be used as a checkpoint"),
        ("hostile", "bad.ckpt holds"),
        ("another dataset", "the checkpoint was trained on digits, this run has"),
    ],
)
def test_foreign_checkpoint_is_one_clear_message(
    cli: Run, saved: Path, small: Path, tmp_path: Path, case: str, message: str
) -> None:
    path, content = tmp_path / "bad.ckpt", checkpoint(saved)
    if case == "truncated":
        path.write_bytes(saved.read_bytes()[:5000])
    elif case == "hostile":
        path.write_bytes(as_checkpoint(content | {"callbacks": Calls(os.system, f"touch {tmp_path}/ran")}))
    else:
        if case == "other classes":
            content["state_dict"] = {name: w[:7] for name, w in content["state_dict"].items()}
        if case == "another dataset":
            content["MNISTDataModule"] |= {"dataset": "digits", "digest": "another"}
        torch.save(content, path)
    config = CONFIGS / ("cnn.yaml" if case == "another model" else "logistic.yaml")
    fit = ("fit", "--config", config, "--data.dataset", small, "--trainer.max_epochs=3")
    assert_one_message(cli(*fit, "--ckpt_path", path, ok=False), message)
    assert not (tmp_path / "ran").exists()


def test_config_and_not_the_checkpoint_says_what_is_built(cli: Run, saved: Path, small: Path, tmp_path: Path) -> None:
    """Class names out of a stranger's file would be imported."""
    content = checkpoint(saved)
    content["hyper_parameters"] = {"_class_path": "torch.nn.Module", "_instantiator": "os.system"}
    torch.save(content, tmp_path / "foreign.ckpt")
    done = cli("test", *QUICK[1:3], "--data.dataset", small, "--ckpt_path=foreign.ckpt")
    assert "test/acc" in done.stdout


def test_last_passes_over_what_is_broken(cli: Run, saved: Path, small: Path, tmp_path: Path) -> None:
    def resumes_from() -> str:
        found = newest_checkpoint(tmp_path)
        return str(Path(found.path).relative_to(tmp_path / "lightning_logs")) if found else ""

    assert resumes_from() == ""
    for version, age in ((0, 300), (1, 200), (2, 100)):
        folder = tmp_path / f"lightning_logs/version_{version}/checkpoints"
        shutil.copytree(saved.parent, folder)
        for path in folder.iterdir():
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    newest = tmp_path / "lightning_logs/version_2/checkpoints"
    assert resumes_from() == "version_2/checkpoints/last.ckpt"
    (newest / "last.ckpt").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="last.ckpt cannot be used as a checkpoint .*passed over"):
        assert resumes_from() == "version_2/checkpoints/best.ckpt"
    (newest / "best.ckpt").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="best.ckpt cannot be used as a checkpoint .*passed over"):
        assert resumes_from() == "version_1/checkpoints/last.ckpt"
    done = cli(*QUICK, "--data.dataset", small, "--ckpt_path=last", "--trainer.max_epochs=3")
    assert done.stderr.count(": passed over\n") == 2
    assert "resuming from lightning_logs/version_1/checkpoints/last.ckpt" in done.stderr
    assert checkpoint(tmp_path / "lightning_logs/version_1/checkpoints/last.ckpt")["epoch"] == 2


# -------------------------------------------------------------------------------------- disk trouble


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("not allowed to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def nearly_full(saved: Path, small: Path, tiny_disk: Path):
    """A command that resumes a run on a disk with so many bytes left, and the folder of its checkpoints."""
    folder = tiny_disk / LAST.parent
    shutil.copytree(saved.parent, folder)

    def resume(room: int) -> tuple:
        free = shutil.disk_usage(tiny_disk).free
        (tiny_disk / "filler").write_bytes(bytes(free - room))
        resume = (*QUICK, "--data.dataset", small, f"--trainer.default_root_dir={tiny_disk}", "--ckpt_path=last")
        return (*resume, "--trainer.max_epochs=3")

    return resume, folder


def test_full_disk_loses_no_checkpoint(cli: Run, nearly_full, tiny_disk: Path) -> None:
    """The checkpoint to resume from stays whole when the next one does not fit."""
    resume, folder = nearly_full
    before = (folder / "last.ckpt").read_bytes()
    # Room for config and curves. Pictures would not fit, and a thread writes them: the first file to fail would vary.
    arguments = resume(16384 + 4096)
    done = cli(*arguments, "--dashboard.every_n_epochs=0", ok=False)
    assert_one_message(done, "cannot write the checkpoint", "No space left on device", "--ckpt_path=last")
    assert re.search(r"/(last\.pending|best\.ckpt) \(No space", done.stderr)
    assert (folder / "last.ckpt").read_bytes() == before
    assert not [path for path in folder.iterdir() if "part" in path.name]

    (tiny_disk / "filler").unlink()
    cli(*arguments)
    assert checkpoint(folder / "last.ckpt")["epoch"] == 2


@pytest.mark.parametrize(
    "first", ["checkpoint, then the logger", *(pytest.param(f, marks=pytest.mark.slow) for f in ("config", "pictures"))]
)
def test_full_disk_is_one_message_whatever_fails_first(cli: Run, nearly_full, tiny_disk: Path, first: str) -> None:
    resume, folder = nearly_full
    before = (folder / "last.ckpt").read_bytes()
    logger = ("--trainer.logger=returns.FullDisk",) if first.startswith("checkpoint") else ()
    done = cli(*resume(4096 if first == "config" else 32768), *logger, ok=False)
    assert_one_message(done, "No space left on device", "make room", "--ckpt_path=last")
    assert first == "config" or "cannot write the checkpoint" in done.stderr
    assert (folder / "last.ckpt").read_bytes() == before
    assert not [path for path in folder.iterdir() if "part" in path.name]


@pytest.mark.slow
def test_full_disk_leaves_no_fast_copy(cli: Run, small: Path, tiny_disk: Path) -> None:
    done = cli(*QUICK, "--data.dataset", small, f"--data.data_dir={tiny_disk}/data", ok=False)
    assert_one_message(done, "cannot write in the data folder", "No space left on device", "--data.data_dir")
    assert [path.name for path in (tiny_disk / "data").rglob("*") if path.is_file()] == [".lock"]


@pytest.mark.slow
@pytest.mark.mnist
def test_full_disk_leaves_no_download(cli: Run, mnist_archive: Path, tiny_disk: Path) -> None:
    with server("whole", mnist_archive.read_bytes()) as (url, _):
        data = ("--data.dataset=mnist", f"--data.url={url}", f"--data.data_dir={tiny_disk}")
        done = cli(*QUICK, *data, ok=False)
    assert_one_message(done, "cannot write in the data folder", "No space left on device")
    assert [path.name for path in tiny_disk.rglob("*") if path.is_file()] == [".lock"]


def test_file_size_limit_during_a_checkpoint(cli: Run, small: Path, tmp_path: Path) -> None:
    """The same without a file system of its own: no file may be longer than 32 KiB."""
    done = cli(*QUICK, "--data.dataset", small, "--trainer.callbacks+=interrupt.FileSizeLimit", ok=False)
    assert_one_message(done, "cannot write the checkpoint", "File too large")
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.slow
def test_run_folder_deleted_while_training(cli: Run, small: Path, tmp_path: Path) -> None:
    """One message, and the weights of that moment are written where the folder was."""
    deletes = ("--trainer.callbacks+=interrupt.DeleteRun",)
    done = cli(*QUICK, "--data.dataset", small, *deletes, ok=False)
    assert_one_message(done, "has vanished", "exception.ckpt")
    kept = tmp_path / RUN / "checkpoints" / "exception.ckpt"
    # Deleted after step 10; the thread that writes the curves notices at some time after that.
    assert checkpoint(kept)["global_step"] in range(11, 17)
    cli(*QUICK, "--data.dataset", small, "--init_from", kept)


def test_error_in_training_keeps_the_weights_and_shows_its_traceback(cli: Run, small: Path, tmp_path: Path) -> None:
    done = cli(*QUICK, "--data.dataset", small, "--trainer.callbacks+=interrupt.Fail", ok=False)
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    folder = tmp_path / RUN / "checkpoints"
    assert checkpoint(folder / "exception.ckpt")["global_step"] == 20
    assert checkpoint(folder / "last.ckpt")["global_step"] == 16
    resumed = cli(*QUICK, "--data.dataset", small, "--ckpt_path=last")
    assert "resuming from lightning_logs/version_0/checkpoints/last.ckpt" in resumed.stderr


def test_place_of_runs_that_cannot_be_written(cli: Run, small: Path, tmp_path: Path) -> None:
    (tmp_path / "lightning_logs").write_text("a file")
    done = cli(*QUICK, "--data.dataset", small, ok=False)
    assert_one_message(done, "cannot write in lightning_logs", "--trainer.default_root_dir")
