"""Evaluation episodes are stored in the layout of marl-eval."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.recipes.runs import curves, run_folders, run_recipe
from torchrl_marl.run.records import EvaluationRecord, merge_records


def new_record(path: Path, **options: object) -> EvaluationRecord:
    return EvaluationRecord(path, **{"environment": "vmas", "task": "t", "method": "m", "seed": 0, **options})


def steps_of(path: Path) -> dict:
    return json.loads(path.read_text())["vmas"]["t"]["m"]["seed_0"]


def test_a_run_stores_every_episode_as_marl_eval_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path, "loss=maspo", "seed=3")
    (folder,) = run_folders(tmp_path)
    stored = json.loads((folder / "evaluations.json").read_text())
    steps = stored["vmas"]["navigation"]["maspo"]["seed_3"]
    # as marl-eval wants it: a count and lists with one value an episode at every step, ten times as many at the end
    assert list(steps) == ["step_0", "step_1", "step_2", "step_3", "absolute_metrics"]
    assert [steps[f"step_{index}"]["step_count"] for index in range(4)] == [0, 80, 160, 240]
    for name, step in steps.items():
        episodes = 40 if name == "absolute_metrics" else 4
        assert {metric: len(values) for metric, values in step.items() if metric != "step_count"} == {
            "return": episodes,
            "episode_length": episodes,
        }
    rows = curves(folder)["eval/reward/episode_reward_mean"].split()
    means = [np.mean(steps[f"step_{index}"]["return"]) for index in range(4)]
    assert means == pytest.approx([float(row.split(",")[1]) for row in rows], rel=1e-6)
    absolute = json.loads((folder / "summary.json").read_text())["absolute"]
    assert np.mean(steps["absolute_metrics"]["return"]) == pytest.approx(absolute, rel=1e-6)


def test_a_resumed_record_holds_every_evaluation_once(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.json"
    record = new_record(path)
    for frames in (0, 10, 20):
        record.add(frames, {"return": [float(frames)]})
    record.add_absolute({"return": [1.0] * 10})
    resumed = new_record(path, resumed_at=10)
    for frames in (20, 30):
        resumed.add(frames, {"return": [-float(frames)]})
    steps = steps_of(path)
    assert [step["return"] for step in steps.values()] == [[0.0], [10.0], [-20.0], [-30.0]]
    assert list(steps) == ["step_0", "step_1", "step_2", "step_3"]


def test_merging_keeps_every_run_and_refuses_one_that_is_there_twice(tmp_path: Path) -> None:
    names = [("t", "m", 0), ("t", "m", 1), ("t", "other", 0), ("u", "m", 0)]
    paths = [(tmp_path / f"{index}.json", task, method) for index, (task, method, _) in enumerate(names)]
    for (path, _, method), (task, _, seed) in zip(paths, names, strict=True):
        new_record(path, task=task, method=method, seed=seed).add(0, {"return": [1.0]})
    merged = merge_records(paths)["vmas"]
    assert {(t, m, s) for t in merged for m in merged[t] for s in merged[t][m]} == {
        (task, method, f"seed_{seed}") for task, method, seed in names
    }
    with pytest.raises(ValueError, match="seed_0 of m on t"):
        merge_records([paths[0], paths[0]])


def test_variants_of_a_method_merge_under_their_own_names(tmp_path: Path) -> None:
    names = ["mars lr=0.1", "mars lr=0.2"]
    for value, name in enumerate(names):
        new_record(tmp_path / name, task="t", method="mars", seed=0).add(0, {"return": [float(value)]})
    merged = merge_records([(tmp_path / name, "t", name) for name in names])["vmas"]["t"]
    assert [merged[name]["seed_0"]["step_0"]["return"] for name in names] == [[0.0], [1.0]]
