"""Metrics end up where a user looks for them."""

import subprocess
from pathlib import Path

import pytest

from torchrl_marl import loggers
from torchrl_marl.loggers import MetricLog, git_commit, run_group


def new_log(folder: Path, **options: object) -> MetricLog:
    standard = {"config": {}, "name": "n", "group": "g", "tags": (), "run_id": "id", "wandb_project": None}
    return MetricLog(folder, **{**standard, **options})


def test_a_resumed_curve_holds_every_frame_once(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    for frames in (10, 20, 30):
        log.log({"eval/x": frames / 10}, frames)
    with (tmp_path / "scalars/eval/x.csv").open("a") as file:
        file.write("40,4.")  # killed in the middle of a line
    resumed = new_log(tmp_path, resumed_at=20)
    for frames in (30, 40):
        resumed.log({"eval/x": frames}, frames)
    assert (tmp_path / "scalars/eval/x.csv").read_text() == "10,1.0\n20,2.0\n30,30.0\n40,40.0\n"


def test_runs_share_a_group_if_only_seed_and_place_differ() -> None:
    base = {"seed": 0, "lr": 0.1, "folder": "a", "resume": None, "device": "cpu", "logger": {}}
    group = run_group("mars", "balance", base)
    assert group.startswith("mars_balance_")
    same = {"seed": 5, "lr": 0.1, "folder": "b", "resume": "x", "device": "cuda", "logger": {"tensorboard": True}}
    assert run_group("mars", "balance", same) == group
    assert run_group("mars", "balance", {**base, "lr": 0.2}) != group


@pytest.mark.parametrize(
    ("key", "netrc", "expected"),
    [("secret", "", True), ("", "machine api.wandb.ai login user password x", True), ("", "", False)],
)
def test_a_login_is_found_without_asking(
    key: str, netrc: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".netrc"
    file.write_text(netrc)
    file.chmod(0o600)
    assert loggers._logged_in() is expected


def test_the_commit_is_that_of_the_source_tree() -> None:
    root = Path(__file__).parents[1]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not a git checkout")
    assert git_commit().removesuffix("-dirty") == head.stdout.strip()
