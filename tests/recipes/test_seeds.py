"""Seeds that train together, against the recipe that trains one at a time."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.recipes.runs import run_folders, run_recipe
from tests.recipes.test_mars_vmas import GRU
from torchrl_marl.checkpoints import find_checkpoint, load_policy

UNEQUAL = ["minibatch_size=30", "total_frames=320", "evaluation.interval=160"]  # the last minibatch is smaller


def seeds_of(folder: Path) -> dict[int, Path]:
    return {OmegaConf.load(run / "config.yaml").seed: run for run in run_folders(folder)}


def values(file: Path) -> list[tuple[int, float]]:
    return [(int(frames), float(value)) for frames, value in (row.split(",") for row in file.read_text().split())]


def assert_same_run(one: Path, other: Path, tolerance: float = 2e-4) -> None:
    """Everything measured, what was played in evaluations and the parameters are those of the other run."""
    files = [
        {file.relative_to(run / "scalars"): file for file in (run / "scalars").rglob("*.csv") if "timers" not in str(file)}
        for run in (one, other)
    ]
    assert set(files[0]) == set(files[1])
    for name, file in files[0].items():
        for own, others in zip(values(file), values(files[1][name]), strict=True):
            assert own == pytest.approx(others, rel=tolerance, abs=tolerance), name
    assert (one / "evaluations.json").read_text() == (other / "evaluations.json").read_text()
    parameters = [load_policy(find_checkpoint(run)).state_dict() for run in (one, other)]
    for name, value in parameters[0].items():
        torch.testing.assert_close(value, parameters[1][name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "overrides",
    [
        ["env.scenario=CoordSum-2x5", "loss=mars"],
        ["env.scenario=CoordSum-2x5", "loss=ippo", "actor.share_parameters=false", "critic.value_norm=null"],
        ["env.scenario=CoordSum-2x5", "loss=mappo", *GRU],
        ["env=maze", "loss=maspo", "max_grad_norm=0.01"],
        ["env=paxmen", "loss=mars"],
        ["env=aerocombat", "loss=mars"],
    ],
    ids=["coordsum", "own networks", "gru", "maze", "paxmen", "aerocombat"],
)
def test_a_seed_learns_in_a_group_what_it_learns_alone(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = [] if any(override.startswith("env=") for override in overrides) else ["env=coordsum"]
    run_recipe(monkeypatch, tmp_path / "group", "seed=[7,3]", *env, *overrides, *UNEQUAL, recipe="seeds")
    together = seeds_of(tmp_path / "group")
    assert sorted(together) == [3, 7]
    for seed, run in together.items():
        run_recipe(monkeypatch, tmp_path / f"alone{seed}", f"seed={seed}", *env, *overrides, *UNEQUAL)
        (alone,) = run_folders(tmp_path / f"alone{seed}")
        assert_same_run(run, alone)
