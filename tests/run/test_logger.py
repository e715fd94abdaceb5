"""Metrics end up where a user looks for them."""

import json
import math
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from torchrl_marl.run.logger import MetricLog, git_commit, run_group
from torchrl_marl.run.records import read_metrics


def new_log(folder: Path, **options: object) -> MetricLog:
    standard = {"config": {}, "name": "n", "group": "g", "tags": (), "run_id": "id", "wandb_project": None}
    return MetricLog(folder, **{**standard, **options})


def test_a_resumed_curve_holds_every_frame_once(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    for frames in (10, 20, 30):
        log.log({"eval/x": frames / 10}, frames)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("40,4.")  # killed in the middle of a line
    resumed = new_log(tmp_path, resumed_at=20)
    for frames in (30, 40):
        resumed.log({"eval/x": frames}, frames)
    rows = ["counters/total_frames,eval/x", "10,1.0", "20,2.0", "30,30.0", "40,40.0"]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == rows


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
    measured = {name: dict(zip(*columns, strict=True)) for name, columns in read_metrics(tmp_path).items()}
    assert measured == {
        "counters/total_frames": {20: 20, 30: 30},
        "eval/reward/last_fifth": {30: 1.0},
        "eval/absolute/episode_reward_mean": {30: 2.0},
        "eval/reward/episode_reward_mean": {20: 3.0, 30: 4.0},
    }


def test_pandas_reads_the_table_of_metrics_in_one_line(tmp_path: Path) -> None:
    """Columns that come later are empty before; what is measured at the same frames stands in one row."""
    pandas = pytest.importorskip("pandas")
    log = new_log(tmp_path)
    log.log({"eval/return": -1.5}, 0)
    log.log({"counters/iter": 1, "loss, of two": 1 / 3}, 10)
    log.log({"counters/iter": 2, "loss, of two": math.nan}, 20)
    log.log({"eval/return": 2.5, "won": 1}, 20)
    log.log({"counters/iter": 3, "loss, of two": 0.25}, 30)
    table = pandas.read_csv(tmp_path / "metrics.csv")
    assert list(table) == ["counters/total_frames", "eval/return", "counters/iter", "loss, of two", "won"]
    assert table["counters/total_frames"].tolist() == [0, 10, 20, 30]
    assert table["loss, of two"].dropna().tolist() == [1 / 3, 0.25]
    assert table["eval/return"].dropna().tolist() == [-1.5, 2.5]
    assert table["won"].dropna().index.tolist() == [2]
    np.testing.assert_array_equal(read_metrics(tmp_path)["loss, of two"], ([10, 20, 30], [1 / 3, math.nan, 0.25]))


def test_a_resumed_table_is_that_of_an_uninterrupted_run_byte_for_byte(tmp_path: Path) -> None:
    rows = [
        (0, {"eval": 1.0}),
        (10, {"x": 0.1}),
        (20, {"x": 0.2, "ended": 1.0}),
        (20, {"eval": 2.0}),
        (30, {"late": 3}),
    ]
    whole, half = tmp_path / "whole", tmp_path / "half"
    for folder in (whole, half):
        folder.mkdir()
        log = new_log(folder)
        for frames, metrics in rows:
            log.log(metrics, frames)
    resumed = new_log(half, resumed_at=10)
    assert (half / "metrics.csv").read_text() == "counters/total_frames,eval,x\n0,1.0,\n10,,0.1\n"
    for frames, metrics in rows[2:]:
        resumed.log(metrics, frames)
    assert (half / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_a_run_of_before_the_table_is_read_and_goes_on(tmp_path: Path) -> None:
    """It had a file for each metric."""
    for name, text in {"eval/x": "0,1.0\n20,2.0\n40,3.0\n", "train/a/loss": "20,0.5\n40,0.25\n"}.items():
        (path := tmp_path / f"scalars/{name}.csv").parent.mkdir(parents=True)
        path.write_text(text)
    assert {name: values.tolist() for name, (_, values) in read_metrics(tmp_path).items()} == {
        "eval/x": [1.0, 2.0, 3.0],
        "train/a/loss": [0.5, 0.25],
    }
    new_log(tmp_path, resumed_at=20).log({"eval/x": 9.0}, 40)
    assert not (tmp_path / "scalars").exists()
    rows = ["counters/total_frames,eval/x,train/a/loss", "0,1.0,", "20,2.0,0.5", "40,9.0,"]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == rows


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
