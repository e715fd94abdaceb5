"""Runs of more than one process: the same numbers after whatever kills one of them, and nothing that hangs."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.recipes.runs import RECIPES, TINY, curves, run_folders, run_recipe
from tests.recipes.test_mars_vmas import wait_for_frames
from torchrl_marl.run.checkpoints import find_checkpoint, read_metadata

LIMIT = 170  # seconds for a process to end
GAME = [*TINY, "env=coordsum", "evaluation.interval=400"]
ENGINES = [
    "multiprocess",
    pytest.param("ray", marks=pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")),
]


@pytest.fixture
def start() -> Iterator:
    """Start a recipe with processes of its own; whatever is left of them at the end of the test is killed."""
    groups = []

    def start_recipe(folder: Path, *overrides: str, processes: int = 1, recipe: str = "mars_vmas") -> subprocess.Popen:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher = torchrun if processes > 1 else []
        command = [sys.executable, *launcher, str(RECIPES / f"{recipe}.py"), *overrides, f"folder={folder}"]
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        groups.append(process.pid)
        return process

    yield start_recipe
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            pass


def printed(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.log").read_text()


def finished(process: subprocess.Popen, folder: Path) -> Path:
    """Wait for a run to end well; return its folder."""
    assert process.wait(LIMIT) == 0, printed(folder)
    (run,) = run_folders(folder)
    return run


def wait_for_checkpoint(folder: Path, frames: int) -> Path:
    """Wait until the one run below ``folder`` has saved a checkpoint of ``frames`` frames or more."""
    for _ in range(50 * LIMIT):
        for path in folder.glob("*/*/*/*/checkpoints/*.torchrl"):
            if int(path.stem.rpartition("-")[2]) >= frames:
                return path.parents[1]
        time.sleep(0.02)
    raise TimeoutError(printed(folder))


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in listed.splitlines())}
    found = [pid]
    for process in found:  # which grows
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def workers(pid: int) -> list[int]:
    """Processes below ``pid`` that collect."""
    names = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in descendants(pid)}
    return [child for child, name in names.items() if b"spawn_main" in name or name.startswith(b"ray::Worker")]


def wait_for_end(processes: list[int]) -> None:
    for _ in range(60 * 5):
        if not any(Path(f"/proc/{process}/cmdline").exists() for process in processes):
            return
        time.sleep(0.2)
    raise TimeoutError(f"still there after a minute: {processes}")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_with_workers_survives_what_is_killed_bit_for_bit(engine: str, tmp_path: Path, start) -> None:
    long = [*GAME, f"collector={engine}", "total_frames=2400", "seed=5"]
    whole = finished(start(tmp_path / "whole", *long), tmp_path / "whole")

    killed = tmp_path / "killed"
    process = start(killed, *long)
    folder = wait_for_checkpoint(killed, 400)
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    everyone = descendants(process.pid)
    assert process.wait(LIMIT) == 1
    assert "A worker that collects has failed or was killed" in printed(killed)
    assert f"Last good checkpoint: {find_checkpoint(folder)}" in printed(killed)
    assert f'resume="{folder}"' in printed(killed)
    wait_for_end(everyone)

    process = start(killed, f"resume={folder}")
    wait_for_checkpoint(killed, 1200)
    everyone = workers(process.pid)
    assert len(everyone) == 2
    process.send_signal(signal.SIGKILL)
    assert process.wait(LIMIT) == -signal.SIGKILL
    wait_for_end(everyone)

    assert finished(start(killed, f"resume={folder}"), killed) == folder
    assert curves(folder) == curves(whole)
    assert (folder / "evaluations.json").read_text() == (whole / "evaluations.json").read_text()


def open_to_the_network(processes: list[int]) -> list[str]:
    """Addresses beyond this machine's own at which some processes listen, as hexadecimal numbers."""
    opened = {os.readlink(file) for process in processes for file in Path(f"/proc/{process}/fd").iterdir()}
    rows = [
        row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/net/{table}").read_text().split("\n")[1:-1]
    ]
    listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in opened]
    return [address for address in listening if not address.partition(":")[0].endswith("0100007F")]  # 127.0.0.1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_interruption_reaches_workers_and_leaves_a_checkpoint(engine: str, tmp_path: Path, start) -> None:
    folder = tmp_path / "stopped"
    process = start(folder, *GAME, f"collector={engine}", "total_frames=100000000")
    wait_for_frames(folder, 480)
    everyone = descendants(process.pid)
    assert open_to_the_network([process.pid, *everyone]) == []
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches every process of a terminal
    assert process.wait(LIMIT) == 0, printed(folder)
    (run,) = run_folders(folder)
    assert f'Go on with \'resume="{run}"' in printed(folder)
    assert read_metadata(find_checkpoint(run))["frames"] >= 400
    wait_for_end(everyone)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mars_vmas", "qmix_vmas"])
def test_torchrun_learns_as_one_run_and_resumes_bit_for_bit(recipe: str, tmp_path: Path, start) -> None:
    unread = "critic." if recipe == "qmix_vmas" else "-"
    long = [*(word for word in GAME if not word.startswith(unread)), "total_frames=1600"]
    start = partial(start, recipe=recipe)
    whole = finished(start(tmp_path / "whole", *long, processes=2), tmp_path / "whole")
    assert json.loads((whole / "summary.json").read_text())["frames"] == 1600
    assert OmegaConf.load(whole / "config.yaml").processes == 2
    killed = tmp_path / "killed"
    process = start(killed, *long, processes=2)
    folder = wait_for_checkpoint(killed, 400)
    rank_1 = next(
        child for child in descendants(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()
    )
    os.kill(rank_1, signal.SIGKILL)
    assert process.wait(LIMIT) != 0
    assert read_metadata(find_checkpoint(folder))["frames"] < 1600

    process = start(killed, f"resume={folder}")
    assert process.wait(LIMIT) == 1
    assert "The configuration says processes=2, but the world size is 1" in printed(killed)

    assert finished(start(killed, f"resume={folder}", processes=2), killed) == folder
    assert curves(folder) == curves(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 500 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10)


def test_a_full_disk_leaves_a_checkpoint_to_go_on_from_elsewhere(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = ["env=coordsum", "actor.hidden_sizes=[256]", "critic.hidden_sizes=[256]", "total_frames=320"]
    run_recipe(monkeypatch, tmp_path / "whole", *wide)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(RuntimeError, match=r"No space left on device.*Last good checkpoint.*Go on with") as stopped:
        run_recipe(monkeypatch, small_disk, *wide)
    (folder,) = run_folders(small_disk)
    assert str(find_checkpoint(folder)) in str(stopped.value)
    assert all(read_metadata(path)["frames"] < 320 for path in (folder / "checkpoints").glob("*.torchrl"))
    roomy = shutil.copytree(folder, tmp_path / "roomy" / folder.name)
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={roomy}")
    assert curves(roomy) == curves(run_folders(tmp_path / "whole")[0])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs hydra-submitit-launcher")
def test_a_grid_is_submitted_as_jobs(tmp_path: Path, start) -> None:
    folder = tmp_path / "grid"
    process = start(folder, "-m", *GAME, "total_frames=80", "hydra/launcher=submitit_local", "seed=0,1")
    assert process.wait(LIMIT) == 0, printed(folder)
    assert sorted(OmegaConf.load(run / "config.yaml").seed for run in run_folders(folder)) == [0, 1]
    assert all((run / "summary.json").exists() for run in run_folders(folder))


@pytest.mark.gpu
def test_workers_on_the_cpu_collect_for_a_learner_on_the_gpu(tmp_path: Path, start) -> None:
    run = finished(start(tmp_path / "run", *GAME, "collector=multiprocess", "device=cuda"), tmp_path / "run")
    assert json.loads((run / "summary.json").read_text())["frames"] == 240
