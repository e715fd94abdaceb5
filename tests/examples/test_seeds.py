"""Seeds that train together, against the recipe that trains one at a time."""

import math
import re
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from examples.seeds import SeedGroup, train, words_of_seeds
from tests.recipes.runs import TINY, run_folders, run_recipe
from tests.recipes.test_mars_vmas import GRU, assert_same_traces
from torchrl_marl.evaluation.comparison import check_comparable
from torchrl_marl.run.checkpoints import find_checkpoint, load_policy, read_metadata
from torchrl_marl.run.logger import MetricLog
from torchrl_marl.run.records import read_metrics, read_runs

UNEQUAL = ["minibatch_size=30", "total_frames=320", "evaluation.interval=160"]  # the last minibatch is smaller


def run_seeds(folder: Path, *overrides: str) -> None:
    env = [] if any(word.startswith(("env=", "resume=")) for word in overrides) else ["env=coordsum"]
    sizes = [] if any(word.startswith("resume=") for word in overrides) else TINY
    train([*env, *sizes, f"folder={folder}", *overrides])


def seeds_of(folder: Path) -> dict[int, Path]:
    return {OmegaConf.load(run / "config.yaml").seed: run for run in run_folders(folder)}


def assert_same_run(one: Path, other: Path, tolerance: float = 2e-4) -> None:
    """All that the other run has measured, what was played in evaluations and the parameters are the same."""
    metrics = [
        {name: dict(zip(*rows, strict=True)) for name, rows in read_metrics(run).items() if "timers" not in name}
        for run in (one, other)
    ]
    assert set(metrics[0]) == set(metrics[1])
    for name, own in metrics[0].items():
        others = metrics[1][name]
        assert {frames: own[frames] for frames in others} == pytest.approx(others, rel=tolerance, abs=tolerance), name
    assert (one / "evaluations.json").read_text() == (other / "evaluations.json").read_text()
    parameters = [load_policy(find_checkpoint(run)).state_dict() for run in (one, other)]
    for name, value in parameters[0].items():
        torch.testing.assert_close(value, parameters[1][name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "overrides",
    [
        ["env=coordsum", "env.scenario=CoordSum-2x5", "loss=ippo", "actor.share_parameters=false"],
        ["env=coordsum", "env.scenario=CoordSum-2x5", "loss=mappo", "critic.value_norm=null", *GRU],
        ["env=maze", "loss=maspo", "max_grad_norm=0.01"],
        ["env=aerocombat", "loss=mars"],  # continuous actions
    ],
    ids=["own networks", "gru", "maze", "aerocombat"],
)
def test_a_seed_learns_in_a_group_what_it_learns_alone(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_seeds(tmp_path / "group", "seed=[3,7]", *overrides, *UNEQUAL)
    run_recipe(monkeypatch, tmp_path / "alone", "seed=7", *overrides, *UNEQUAL)
    assert_same_run(seeds_of(tmp_path / "group")[7], run_folders(tmp_path / "alone")[0])


def test_a_seed_of_a_group_goes_on_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint holds the optimiser's state, the random state and the streams as those of a run alone."""
    overrides = ["env=coordsum", "env.scenario=CoordSum-2x5", "loss=mappo", "evaluation.interval=160"]
    run_seeds(tmp_path / "group", "seed=[2,5]", *overrides, "total_frames=160")
    run_recipe(monkeypatch, tmp_path / "whole", "seed=5", *overrides, "total_frames=400")
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    begun = seeds_of(tmp_path / "group")[5]
    run_recipe(monkeypatch, tmp_path, f"resume={begun}", "total_frames=400")
    assert_same_run(begun, run_folders(tmp_path / "whole")[0])


def test_the_seeds_of_a_group_are_compared_as_separate_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_seeds(tmp_path, "env=maze", "loss=mappo", "seed=[2,5,6]")
    runs, unfinished = read_runs([tmp_path])
    check_comparable(runs)
    assert list(runs.seed) == [2, 5, 6]
    assert not unfinished
    for sessions in runs.sessions:
        command = sessions[0]["command"]
        assert command.startswith("python recipes/mars_vmas.py ")  # what this seed can be trained with alone
        assert " env=maze loss=mappo " in command
        assert re.search(r" seed=[256]$", command)


def test_a_nan_in_one_seed_ends_all_of_them_with_their_logs_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    closed = {}
    monkeypatch.setattr(MetricLog, "finish", lambda log, failed: closed.__setitem__(log._folder, failed))
    record = SeedGroup.record
    diverge = torch.tensor([0.0, math.nan])
    monkeypatch.setattr(SeedGroup, "record", lambda group, metrics: record(group, metrics | {"loss_critic": diverge}))
    with pytest.raises(FloatingPointError, match="loss_critic is nan") as stopped:
        run_seeds(tmp_path, "env.scenario=CoordSum-2x5", "seed=[2,5]")
    folders = seeds_of(tmp_path)
    assert closed == {folders[2]: True, folders[5]: True}
    assert str(folders[5]) in str(stopped.value)


def test_an_interrupted_group_ends_after_each_seed_has_closed_its_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = []
    finish = MetricLog.finish
    monkeypatch.setattr(MetricLog, "finish", lambda log, *summary: closed.append(log._folder) or finish(log, *summary))
    monkeypatch.setattr(SeedGroup, "record", lambda group, _: [seed.run.interrupt() for seed in group.seeds])
    run_seeds(tmp_path, "seed=[2,5]")
    folders = seeds_of(tmp_path)
    assert closed == [folders[2], folders[5]]
    printed = capsys.readouterr().out
    assert all(f'resume="{folder}"' in printed for folder in folders.values())


@pytest.mark.parametrize(
    ("override", "allowed", "found"),
    [
        ("env=vmas", "env=coordsum, maze, paxmen, aerocombat", "env=vmas"),
        ("loss=seac", "MAPPOLoss, IPPOLoss, MASPOLoss, MARSLoss", "SEACLoss"),
        ("loss.functional=true", "functional=False", "True"),
        ("loss.reduction=sum", "reduction='mean'", "'sum'"),
        ("compile=true", "compile=false", "compile=true"),
        ("collector=multiprocess", "collector=default", "torchrl_marl.collectors.multiprocess_collector"),
        ("optimizer._target_=torch.optim.LBFGS", "Adam, AdamW, RMSprop, SGD", "LBFGS"),
    ],
)
def test_what_cannot_be_stacked_is_refused_with_what_can(
    override: str, allowed: str, found: str, tmp_path: Path
) -> None:
    eps = ["~optimizer.eps", "~optimizer.fused"] if "optimizer" in override else []  # LBFGS has none
    with pytest.raises(ValueError, match="Seeds train together") as refused:
        run_seeds(tmp_path, override, *eps)
    assert allowed in str(refused.value)
    assert f"got {found}" in str(refused.value)
    assert not run_folders(tmp_path)


@pytest.mark.parametrize("numbers", ["[]", "[3, 3]"])
def test_seeds_of_a_group_are_distinct(numbers: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"distinct, and at least one; got {numbers}")):
        run_seeds(tmp_path, f"seed={numbers}")


@pytest.mark.parametrize(
    "overrides",
    [["env.scenario=CoordSum-2x5", "loss=mappo", *GRU], ["env=aerocombat", "loss=mars"]],
    ids=["gru", "continuous actions"],
)
def test_an_interrupted_group_resumes_bit_for_bit(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ["seed=[2,5]", "total_frames=320", "evaluation.interval=160", *overrides]
    run_seeds(tmp_path / "whole", *long)
    with monkeypatch.context() as patch:
        record = SeedGroup.record

        def stop_and_record(group: SeedGroup, metrics: dict) -> None:
            if group.seeds[0].run.frames == 160:
                signal.raise_signal(signal.SIGTERM)
                patch.setattr(SeedGroup, "record", record)
            record(group, metrics)

        patch.setattr(SeedGroup, "record", stop_and_record)
        run_seeds(tmp_path / "stopped", *long)
    whole, stopped = seeds_of(tmp_path / "whole"), seeds_of(tmp_path / "stopped")
    assert {read_metadata(find_checkpoint(folder))["frames"] for folder in stopped.values()} == {160}
    run_seeds(tmp_path, f"resume={stopped[5]}")
    for seed, folder in stopped.items():
        assert_same_traces(folder, whole[seed])
        assert (folder / "summary.json").exists()


def test_a_group_goes_on_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on from what all have saved: a kill may come when some have saved and others have not."""
    run_seeds(tmp_path / "group", "seed=[2,5]", "total_frames=80")
    run_recipe(monkeypatch, tmp_path / "alone", "env=coordsum", "total_frames=80")
    folders, (alone,) = seeds_of(tmp_path / "group"), run_folders(tmp_path / "alone")
    newest = {seed: find_checkpoint(folder) for seed, folder in folders.items()}
    again = [f"resume={folders[5]}", "total_frames=160"]
    assert words_of_seeds(again) == [["total_frames=160", f"resume={path}"] for path in newest.values()]
    newest[2].unlink()
    older = words_of_seeds([f"resume={newest[5]}"])
    assert {Path(word).name for (word,) in older} == {"checkpoint-000000000000.torchrl"}
    with pytest.raises(ValueError, match=r"was not written by a group of seeds.*resume=RUN in the recipe"):
        run_seeds(tmp_path, f"resume={alone}")
    folders[2].rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=rf"go on together, but {folders[2]}/checkpoints hold no checkpoint-0+80\."):
        run_seeds(tmp_path, f"resume={folders[5]}")


@pytest.mark.gpu
def test_seeds_train_together_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_seeds(tmp_path, "seed=[2,5]", "device=cuda")
    assert sorted(seeds_of(tmp_path)) == [2, 5]
