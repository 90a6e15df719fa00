"""On a GPU: no step waits for it, and compiled models train, test and resume."""

import re
from pathlib import Path

import pytest
from common import CONFIGS, OVERLAYS, RUN, Run, assert_same, checkpoint
from interrupt import signal_at

pytestmark = pytest.mark.gpu

GPU = ("--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false")
KINDS = {
    "cnn": f"--config={CONFIGS}/cnn.yaml",
    "clipped": f"--config={CONFIGS}/cnn.yaml --trainer.gradient_clip_val=1",
    "compiled": f"--config={CONFIGS}/cnn.yaml --config={OVERLAYS}/gpu.yaml --config={OVERLAYS}/compile.yaml",
    "augmented": f"--config={CONFIGS}/fast.yaml --config={OVERLAYS}/augment.yaml --data.batch_size=64",
    "speed": f"--config={CONFIGS}/cnn.yaml --config={OVERLAYS}/speed.yaml --data.batch_size=8",
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_gpu(cli: Run, small: Path, kind: str) -> None:
    """``torch.cuda.set_sync_debug_mode("error")`` is on in every step that logs nothing, loading included."""
    done = cli(
        *("fit", *KINDS[kind].split(), *GPU, "--data.dataset", small, "--trainer.max_epochs=3"),
        *("--trainer.log_every_n_steps=20", "--trainer.callbacks+=interrupt.NoSync"),
        fork=False,
    )
    checked = re.search(r"(\d+) steps without a wait", done.stdout)
    assert checked is not None
    assert int(checked[1]) >= 20


def test_stopped_compiled_run_resumes_bit_for_bit_and_is_tested_on_a_processor(
    cli_in: Run, small: Path, tmp_path: Path
) -> None:
    fit = ("fit", *KINDS["compiled"].split(), *GPU, "--data.dataset", small, "--trainer.max_epochs=3")
    fit += ("--trainer.deterministic=warn", "--test_after_fit=true")
    stop = signal_at("SIGTERM", "on_train_batch_end", 21)
    for name, runs in {"whole": [()], "stopped": [stop, ("--ckpt_path=last",)]}.items():
        (tmp_path / name).mkdir()
        for arguments in runs:
            done = cli_in(tmp_path / name, *fit, *arguments, fork=False, ok=arguments != stop)
    whole, resumed = (checkpoint(tmp_path / name / RUN / "checkpoints" / "last.ckpt") for name in ("whole", "stopped"))
    assert whole["global_step"] == 48
    for part in ("state_dict", "optimizer_states", "metrics", "global_step"):
        assert_same(whole[part], resumed[part], part)

    on_cpu = ("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.callbacks=[]")
    tested = cli_in(tmp_path / "stopped", "test", "--ckpt_path", RUN / "checkpoints" / "best.ckpt", *on_cpu, fork=False)
    losses = [float(re.findall(r"test/loss\W+([\d.]+)", printed.stdout)[0]) for printed in (done, tested)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # bfloat16
