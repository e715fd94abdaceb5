"""Metrics end up where a user looks for them."""

import json
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchrl_marl.run.logger import MetricLog, git_commit, run_group


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


def test_a_resumed_run_measures_its_end_once(tmp_path: Path) -> None:
    """Ended at 20 frames, killed before its summary, ended again, resumed for more: only the last end is there."""
    end = {"eval/reward/last_fifth": 1.0, "eval/absolute/episode_reward_mean": 2.0}
    log = new_log(tmp_path)
    log.log({"eval/reward/episode_reward_mean": 3.0}, 20)
    log.log(end, 20)
    again = new_log(tmp_path, resumed_at=20)
    again.log(end, 20)
    again.finish({"frames": 20})
    longer = new_log(tmp_path, resumed_at=20)
    assert not (tmp_path / "summary.json").exists()  # the run is unfinished again
    assert json.loads((tmp_path / "abandoned/summary.json").read_text()) == {"frames": 20}
    longer.log({"eval/reward/episode_reward_mean": 4.0, **end}, 30)
    scalars = tmp_path / "scalars/eval"
    assert {path.relative_to(scalars).as_posix(): path.read_text() for path in scalars.rglob("*.csv")} == {
        "reward/last_fifth.csv": "30,1.0\n",
        "absolute/episode_reward_mean.csv": "30,2.0\n",
        "reward/episode_reward_mean.csv": "20,3.0\n30,4.0\n",
    }


def test_runs_share_a_group_if_only_seed_and_place_differ() -> None:
    base = {"seed": 0, "lr": 0.1, "folder": "a", "resume": None, "device": "cpu", "logger": {}}
    group = run_group("mars", "balance", base)
    assert group.startswith("mars_balance_")
    same = {"seed": 5, "lr": 0.1, "folder": "b", "resume": "x", "device": "cuda", "logger": {"tensorboard": True}}
    assert run_group("mars", "balance", same) == group
    assert run_group("mars", "balance", {**base, "lr": 0.2}) != group


def test_a_run_resumed_offline_sends_its_whole_curve_and_puts_the_older_folder_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    sent: list[list[dict]] = []

    def start(**_: object) -> object:
        sent.append([])
        (tmp_path / f"wandb/offline-run-{len(sent)}-id").mkdir(parents=True)
        return SimpleNamespace(offline=True, define_metric=lambda *_, **__: None, log=sent[-1].append)

    monkeypatch.setattr(wandb, "init", start)
    options = {"wandb_project": "p", "wandb_mode": "offline"}
    log = new_log(tmp_path, **options)
    for frames in (10, 20, 30):
        log.log({"train/agents/x": frames / 10, "y": 1.0}, frames)
    resumed = new_log(tmp_path, resumed_at=20, **options)
    resumed.log({"train/agents/x": 9.0, "y": 1.0}, 30)
    expected = [(10, 1.0), (20, 2.0), (30, 9.0)]
    assert [(row["counters/total_frames"], row["train/agents/x"]) for row in sent[1]] == expected
    assert all(row["y"] == 1.0 for row in sent[1])
    assert [path.name for path in (tmp_path / "wandb").iterdir()] == ["offline-run-2-id"]
    assert [path.name for path in (tmp_path / "abandoned").iterdir()] == ["offline-run-1-id"]


@pytest.mark.parametrize("failure", ["no login", "no server"])
def test_wandb_goes_offline_without_asking(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    modes = []

    def start(*, mode: str, **_: object) -> object:
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no server")
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    def login(*, prompt: bool) -> bool:
        assert prompt is False
        return failure == "no server"

    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setattr(wandb, "init", start)
    expected = pytest.warns(UserWarning, match="no server") if failure == "no server" else nullcontext()
    with expected:
        new_log(tmp_path, wandb_project="p", wandb_mode="online")
    assert modes == (["online", "offline"] if failure == "no server" else ["offline"])


def test_the_commit_is_that_of_the_source_tree() -> None:
    root = Path(__file__).parents[2]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not a git checkout")
    assert git_commit().removesuffix("-dirty") == head.stdout.strip()
