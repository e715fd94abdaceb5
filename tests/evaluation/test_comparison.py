"""Runs are compared on one page, or refused with the reason."""

import html
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from tensordict import TensorDictBase
from torchrl.data import Composite, Unbounded

from tests.envs.wrappers.test_custom import OneOfTorchRL
from tests.recipes.runs import RECIPES, run_folders, run_recipe
from torchrl_marl.__main__ import main as evaluate_command
from torchrl_marl.evaluation import (
    iqm,
    probability_of_improvement,
    sample_efficiency,
    stratified_bootstrap_interval,
)
from torchrl_marl.evaluation.comparison import check_comparable
from torchrl_marl.evaluation.figures import Band, draw_aggregates, draw_curves
from torchrl_marl.evaluation.page import Page
from torchrl_marl.run.records import EvaluationRecord, read_metric, read_runs

compare = runpy.run_path(str(RECIPES / "compare.py"))["compare"]
TASKS = ("balance", "navigation")
CONFIG = {
    "env": {
        "_target_": "torchrl_marl.envs.make_env",
        "scenario": "balance",
        "num_envs": 60,
        "max_steps": 100,
        "time_limit": "truncate",
        "scenario_kwargs": {},
    },
    "loss": {"_target_": "MARSLoss"},
    "optimizer": {"lr": 0.001},
    "evaluation": {"interval": 100, "episodes": 32},
    "total_frames": 400,
    "method": "mars",
    "environment": "vmas",
    "recipe": "mars_vmas",
    "folder": "runs",
    "seed": 0,
}


def write_run(
    root: Path, *overrides: str, final: float = 1.0, frames: tuple[int, ...] = (0, 100, 200, 300, 400)
) -> Path:
    """Write what a finished run leaves, as far as a comparison reads it; its curve rises to ``final``."""
    config = OmegaConf.merge(CONFIG, OmegaConf.from_dotlist(list(overrides)))
    folder = root / str(len(list(root.glob("*")) if root.exists() else []))
    scalars = folder / "scalars/eval/reward"
    scalars.mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml")
    rows = [f"{frame},{final * frame / frames[-1]}\n" for frame in frames]
    (scalars / "episode_reward_mean.csv").write_text("".join(rows))
    sessions = [{"command": f"python x.py seed={config.seed}", "git_commit": "c" * 40}]
    summary = {"final": final, "last_fifth": final, "absolute": final - 0.5, "frames": 400, "frames_per_second": 10.0}
    (folder / "summary.json").write_text(json.dumps({**summary, "git_commit": "c" * 40, "sessions": sessions}))
    return folder


def study(root: Path) -> dict[tuple[str, str], np.ndarray]:
    """Two methods on two tasks, three seeds each; returns the absolute metrics by task and method."""
    rng, scores = np.random.default_rng(0), {}
    for task in TASKS:
        for method in ("mars", "mappo"):
            finals = rng.uniform(1, 5, size=3)
            for seed, final in enumerate(finals):
                write_run(root, f"env.scenario={task}", f"method={method}", f"seed={seed}", final=final)
            scores[task, method] = finals - 0.5
    return scores


def page(root: Path, **options: object) -> str:
    compare([root], root.parent / "page", **options)
    return (root.parent / "page/README.md").read_text()


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[str, str], np.ndarray], Path]:
    """Absolute metrics of a study, with an unfinished run beside, and the folder of its page."""
    root = tmp_path_factory.mktemp("study")
    scores = study(root / "runs")
    unfinished = write_run(root / "runs", "seed=9")
    (unfinished / "summary.json").unlink()
    page(root / "runs", baseline="mappo", command="python recipes/compare.py here")
    return scores, root / "page"


def cells(text: str, *starts: str) -> list[str]:
    """Return the cells of the first row of a table that starts with the given ones."""
    row = next(line for line in text.splitlines() if line.startswith("| " + " | ".join(starts) + " |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize(
    ("field", "ours", "theirs"),
    [
        ("env.time_limit", "truncate", "terminate"),
        ("env.max_steps", "100", "200"),
        ("env.scenario_kwargs.n_agents", "(default)", "5"),
        ("env._target_", "torchrl_marl.envs.make_env", "other.make_env"),
        ("total_frames", "400", "800"),
        ("evaluation.interval", "100", "50"),
        ("evaluation.episodes", "32", "64"),
    ],
)
def test_runs_that_differ_in_environment_horizon_or_budget_are_refused_by_name(
    field: str, ours: str, theirs: str, tmp_path: Path
) -> None:
    write_run(tmp_path)
    write_run(tmp_path, "method=mappo", f"{field}={theirs}")
    with pytest.raises(ValueError, match=r"Runs on balance cannot be compared") as refused:
        check_comparable(read_runs([tmp_path])[0])
    _, line = str(refused.value).splitlines()  # that field and no other
    assert line == f"  {field}: {theirs} in 1 of mappo, {ours} in 0 of mars"


def test_methods_may_differ_in_all_that_is_theirs_and_tasks_in_horizon_and_budget(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path, "method=mappo", "loss._target_=MAPPOLoss", "optimizer.lr=0.1", "env.num_envs=600")
    write_run(tmp_path, "seed=1", "device=cuda", "logger.tensorboard=true", "folder=elsewhere", final=2.0)
    write_run(tmp_path, "env.scenario=transport", "env.max_steps=500", "total_frames=800")
    check_comparable(read_runs([tmp_path])[0])


def test_settings_of_one_method_are_not_seeds_but_variants_if_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path, final=1.0)
    write_run(tmp_path, "seed=1", "optimizer.lr=0.01", final=2.0)
    with pytest.raises(ValueError, match=r"not seeds of one configuration.*\n  optimizer.lr: 0.001 in 0 .*\n.*--split"):
        check_comparable(read_runs([tmp_path])[0])
    runs, _ = read_runs([tmp_path], split=["optimizer.lr"])
    check_comparable(runs)
    assert list(runs.method) == ["mars lr=0.001", "mars lr=0.01"]
    with pytest.raises(ValueError, match=r"setting 'optimiser.lr' to split by; nearest: optimizer.lr"):
        read_runs([tmp_path], split=["optimiser.lr"])


def test_variants_that_differ_in_what_a_key_names_are_called_by_its_last_part(tmp_path: Path) -> None:
    write_run(tmp_path, "loss._target_=torchrl_marl.objectives.MARSLoss")
    runs, _ = read_runs([tmp_path], split=["loss._target_", "optimizer.lr"])
    assert list(runs.method) == ["mars loss=MARSLoss lr=0.001"]


def test_trials_of_tuning_are_no_results(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path / "tuning", "optimizer.lr=0.5", final=9.0)
    assert list(read_runs([tmp_path])[0].final) == [1.0]


def test_a_seed_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, final=1.0)
    write_run(tmp_path, final=2.0)
    with pytest.raises(ValueError, match="Seed 0 of mars on balance appears 2 times"):
        check_comparable(read_runs([tmp_path])[0])


def test_two_seeds_with_one_curve_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path, "seed=1")
    with pytest.raises(ValueError, match="Seeds 0 and 1 of mars on balance have the same curve"):
        check_comparable(read_runs([tmp_path])[0])


def test_one_task_with_two_kinds_of_actions_is_two_tasks_of_the_page(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        for kind, final in (([], 1.0), (["env.continuous_actions=false"], 5.0)):
            run = write_run(tmp_path / "runs", f"seed={seed}", *kind, final=final + seed)
            record = EvaluationRecord(
                run / "evaluations.json", environment="vmas", task="balance", method="mars", seed=seed
            )
            record.add(0, {"return": [final]})
    text = page(tmp_path / "runs")
    for kind, final in (("(default)", 2.0), ("False", 6.0)):
        task = f"balance continuous_actions={kind}"
        assert cells(text, task, "mars", "0 to 2")[3].startswith(f"{final:.2f} ")
    merged = json.loads((tmp_path / "page/evaluations.json").read_text())["vmas"]
    assert {task: list(methods["mars"]) for task, methods in merged.items()} == {
        f"balance continuous_actions={kind}": ["seed_0", "seed_1", "seed_2"] for kind in ("(default)", "False")
    }


def test_seeds_may_have_the_same_evaluations_in_a_game_without_chance(tmp_path: Path) -> None:
    for seed in (0, 1):
        losses = write_run(tmp_path, f"seed={seed}") / "scalars/train"
        losses.mkdir()
        (losses / "loss_objective.csv").write_text(f"100,0.{seed}\n")
    check_comparable(read_runs([tmp_path])[0])


def test_the_page_states_statistics_of_the_absolute_metric(studied: tuple) -> None:
    scores, folder = studied
    text = (folder / "README.md").read_text()
    for (task, method), values in scores.items():
        low, high = stratified_bootstrap_interval(values)
        assert cells(text, task, method, "0 to 2")[5] == f"{iqm(values):.2f} [{low:.2f}, {high:.2f}]"
    ours, theirs = (np.stack([scores[task, method] for task in TASKS], -1) for method in ("mars", "mappo"))
    expected = {task: probability_of_improvement(ours[:, index], theirs[:, index]) for index, task in enumerate(TASKS)}
    expected["2 tasks together"] = (expected["balance"] + expected["navigation"]) / 2
    for title, probability in expected.items():
        assert cells(text.split("## Probability")[1], title, "mars")[2].startswith(f"{probability:.2f} [")
    # a curve rises from 0 to the final return, half a point above the absolute metric: these are the bounds
    normalised = ours / (np.maximum(ours, theirs).max(0) + 0.5)
    assert cells(text, "vmas", "2", "mars", "3")[4].startswith(f"{iqm(normalised):.2f} [")
    assert cells(text, "vmas", "2", "mars", "3")[6].startswith(f"{1 - normalised.mean():.2f} [")


def test_the_figures_show_statistics_over_runs_and_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}

    def keep(efficiency: dict, profiles: dict) -> Figure:
        drawn.update(efficiency=efficiency["mars"], profile=profiles["mars"])
        return draw_aggregates(efficiency, profiles)

    monkeypatch.setattr("torchrl_marl.evaluation.comparison.draw_aggregates", keep)
    scores = study(tmp_path / "runs")
    page(tmp_path / "runs")
    ours, theirs = (np.stack([scores[task, method] for task in TASKS], -1) for method in ("mars", "mappo"))
    top = np.maximum(ours, theirs).max(0) + 0.5
    percent = np.linspace(0, 100, 101)
    curves = ((ours + 0.5) / top)[..., None] * percent / 100  # straight from 0 to the final return
    low, high = stratified_bootstrap_interval(curves, sample_efficiency)
    np.testing.assert_allclose(drawn["efficiency"], [percent, sample_efficiency(curves), low, high], atol=1e-12)
    thresholds = np.linspace(0, 1, 101)
    shares = [(ours / top > threshold).mean() for threshold in thresholds]
    np.testing.assert_allclose(drawn["profile"].center, 100 * np.array(shares))


def test_metrics_of_training_are_drawn_at_every_step_and_over_a_decade_logarithmically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = {"mars": ([0.5, 0.25, 0.3], [2.0, 3.0, 4.0]), "mappo": ([0.8, 0.7, 0.6], [3.0, 21.0, 3.0])}
    for method, metrics in ratios.items():
        for seed in range(3):
            run = write_run(tmp_path / "runs", f"method={method}", f"seed={seed}", final=1.0 + seed)
            for name, values in zip(("min_ratio", "max_ratio"), metrics, strict=True):
                path = run / f"scalars/train/agents/{name}.csv"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(f"{50 * step},{value}\n" for step, value in enumerate(values)))
    figures = {}
    monkeypatch.setattr(Page, "figure", lambda _, figure, name, __: figures.update({name: figure}))
    names = ("train/agents/min_ratio", "train/agents/max_ratio")
    compare([tmp_path / "runs"], tmp_path / "page", metrics=names)
    for index, (name, scale) in enumerate(zip(names, ("linear", "log"), strict=True)):
        (axes,) = figures[name.replace("/", "_")].axes
        assert axes.get_yscale() == scale
        for line in axes.lines:
            np.testing.assert_allclose(line.get_xdata(), [0, 50, 100])
            np.testing.assert_allclose(line.get_ydata(), ratios[line.get_label()][index])

    with pytest.raises(ValueError, match=r"no metric 'train/ratio'; it has eval.*, train/agents/max_ratio, train"):
        compare([tmp_path / "runs"], tmp_path / "page", metrics=["train/ratio"])


def test_the_legend_stays_within_a_figure_of_one_panel() -> None:
    point = np.array([0.0, 1.0])
    methods = {f"a method with a long name {index}": Band(point, point, point, point) for index in range(6)}
    figure = draw_curves({"task": methods}, ylabel="return")
    figure.draw_without_rendering()
    extent = figure.legends[0].get_window_extent()
    assert len(figure.legends) == 1
    assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width


def test_long_names_of_variants_fit_and_their_lines_differ() -> None:
    band = Band([0, 1], [0, 1], [0, 0], [1, 1])
    names = [
        f"magpo guider_learner_ratio={ratio} rl_coeff={coeff} guider=make_sable"
        for ratio in (1, 2)
        for coeff in range(3)
    ]
    figure = draw_curves({"task": dict.fromkeys(names, band)}, ylabel="return")
    figure.draw_without_rendering()
    extent = figure.legends[0].get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == len(names)


def test_rows_of_a_legend_are_of_equal_length() -> None:
    point = np.array([0.0, 1.0])
    panels = {task: {f"method{index}": Band(point, point, point, point) for index in range(6)} for task in "ab"}
    figure = draw_curves(panels, ylabel="return")
    figure.draw_without_rendering()
    heights = [round(text.get_window_extent().y0) for text in figure.legends[0].get_texts()]
    assert sorted(Counter(heights).values()) == [3, 3]


def test_the_page_lists_every_command_commit_seed_and_what_was_left_out(studied: tuple) -> None:
    text = (studied[1] / "README.md").read_text()
    assert len(re.findall(r"\| c{12} \| python x\.py seed=[012] \|", text)) == 12
    assert "12 runs: 3 seeds for each method and task" in text
    assert "32 episodes" in text
    assert "320 other episodes" in text
    assert "python recipes/compare.py here" in text
    assert re.search(r"Left out because they are not finished: .*/runs/12\.", text)
    assert "does not rank methods" in text  # three seeds


def test_ten_seeds_come_without_the_warning_and_one_without_an_interval(tmp_path: Path) -> None:
    for seed in range(10):
        write_run(tmp_path / "ten", f"seed={seed}", final=1 + seed / 10)
    assert "does not rank" not in page(tmp_path / "ten")
    write_run(tmp_path / "one")
    assert cells(page(tmp_path / "one"), "balance", "mars", "0")[5] == "0.50"


def test_the_html_page_needs_no_other_file_and_says_the_same(studied: tuple) -> None:
    text, source = ((studied[1] / name).read_text() for name in ("README.md", "page.html"))
    references = re.findall(r'(?:src|href)="([^"]{0,40})', source)
    assert len(references) == 3
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in references)
    assert [path.name for path in sorted(studied[1].glob("*.png"))] == [
        "aggregates.png",
        "curves.png",
        "improvements.png",
    ]
    of_html = [html.unescape(cell) for cell in re.findall(r"<t[dh](?: [^>]*)?>(.*?)</t[dh]>", source)]
    of_markdown = [
        cell.strip()
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("|:")
        for cell in line.strip("|").split("|")
    ]
    assert of_html == of_markdown


def test_an_interrupted_run_with_one_more_evaluation_is_compared_at_the_common_ones(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", final=1.0)
    write_run(tmp_path / "runs", "seed=1", final=2.0, frames=(0, 100, 150, 200, 300, 400))
    assert cells(page(tmp_path / "runs"), "balance", "mars", "0, 1")[3].startswith("1.50")


def test_tasks_that_not_all_methods_played_or_where_nothing_was_learnt_stay_out_of_the_aggregates(
    tmp_path: Path,
) -> None:
    study(tmp_path / "runs")
    write_run(tmp_path / "runs", "env.scenario=transport")
    flat = [
        write_run(tmp_path / "runs", "env.scenario=wheel", f"method={name}", final=0.0) for name in ("mars", "mappo")
    ]
    for folder in flat:
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, "absolute": 0.0}))
    text = page(tmp_path / "runs")
    assert "Probability of improvement over" not in text  # no baseline was chosen
    assert cells(text, "vmas", "2", "mars", "3")
    assert "Scores on balance and navigation, normalised" in text


def test_environments_are_aggregated_apart_and_together(tmp_path: Path) -> None:
    study(tmp_path / "runs")
    for seed in range(3):
        for method in ("mars", "mappo"):
            names = ("environment=mazes", "env.scenario=red", f"method={method}", f"seed={seed}")
            write_run(tmp_path / "runs", *names, final=2.0 + seed)
    text = page(tmp_path / "runs")
    assert [cells(text, name, tasks, "mars")[3] for name, tasks in (("mazes", "1"), ("vmas", "2"), ("all", "3"))] == [
        "3"
    ] * 3


def test_no_run_and_an_unknown_baseline_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No finished run below"):
        read_runs([tmp_path])
    study(tmp_path / "runs")
    with pytest.raises(ValueError, match="No run uses the baseline 'qmix'; the methods are mappo, mars"):
        page(tmp_path / "runs", baseline="qmix")


def test_each_unfinished_run_is_named_in_one_line_and_a_folder_without_a_run_refused(tmp_path: Path, capsys) -> None:
    study(tmp_path / "runs")
    unfinished = [write_run(tmp_path / "begun", f"seed={seed}") for seed in (7, 8)]
    for folder in unfinished:
        (folder / "summary.json").unlink()
    compare([tmp_path / "runs", tmp_path / "begun"], tmp_path / "page")
    lines = capsys.readouterr().err.splitlines()
    for folder, line in zip(unfinished, lines, strict=True):
        assert line == f"{folder} is left out: it is not finished, go on with 'resume=\"{folder}\"'."
    with pytest.raises(ValueError, match=rf"^No finished run below {tmp_path}/begun: "):
        compare([tmp_path / "begun"], tmp_path / "none")
    with pytest.raises(ValueError, match=rf"^No finished run below {tmp_path}/run: "):  # misspelt
        compare([tmp_path / "runs", tmp_path / "run"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_command_makes_a_page_from_real_runs_and_refuses_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(monkeypatch, tmp_path / "runs", "-m", "loss=mars,mappo", "seed=0,1", "total_frames=160")
    script = str(RECIPES / "compare.py")
    arguments = [script, str(tmp_path / "runs"), "--baseline", "mappo", "--output", str(tmp_path / "page")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(script, run_name="__main__")
    assert str(tmp_path / "page/page.html") in capsys.readouterr().out
    text = (tmp_path / "page/README.md").read_text()
    assert cells(text, "navigation", "mars", "0, 1")[6] == "160"
    assert "python recipes/mars_vmas.py" in text
    assert "loss=mars seed=1" in text
    assert str(tmp_path) not in text.split("```")[0]  # nothing of this machine in what is published
    episodes = json.loads((tmp_path / "page/evaluations.json").read_text())["vmas"]["navigation"]
    assert set(episodes) == {"mars", "mappo"}
    assert set(episodes["mars"]) == {"seed_0", "seed_1"}
    run_recipe(monkeypatch, tmp_path / "runs", "loss=mars", "seed=2", "total_frames=160", "env.time_limit=terminate")
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"env\.time_limit: .*terminate"):
        runpy.run_path(script, run_name="__main__")


class Winnable(OneOfTorchRL):
    """States in ``("next", "info")`` whether an episode is won, which is a matter of chance at every step."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(batch_size=(num_envs,))
        self.observation_spec["info"] = Composite(win_rate=Unbounded((num_envs, 1)), shape=(num_envs,))

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDictBase:
        data = super()._reset(tensordict)
        won = torch.rand(*data.batch_size, 1, generator=self.generator) < 0.5
        return data.set(("info", "win_rate"), won.float())


def winnable(num_envs: int) -> Winnable:
    return Winnable(num_envs)


def test_a_metric_of_the_environments_own_is_logged_stored_compared_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = f"{__name__}:winnable"
    run_recipe(monkeypatch, tmp_path / "runs", "env=custom", f"env.factory={factory}", "total_frames=80")
    (folder,) = run_folders(tmp_path / "runs")
    (methods,) = json.loads((folder / "evaluations.json").read_text())["custom"].values()
    steps = methods["mars"]["seed_0"]
    assert len(steps["absolute_metrics"]["win_rate"]) == 40
    assert set(steps["absolute_metrics"]["win_rate"]) <= {0.0, 1.0}
    _, logged = read_metric(folder, "eval/info/win_rate")
    np.testing.assert_allclose(logged, [np.mean(steps[f"step_{step}"]["win_rate"]) for step in range(2)])
    _, absolute = read_metric(folder, "eval/absolute/win_rate")
    np.testing.assert_allclose(absolute, [np.mean(steps["absolute_metrics"]["win_rate"])])
    text = page(tmp_path / "runs", metric="win_rate")
    assert "| final win_rate |" in text
    row = cells(text, factory, "mars", "0")
    assert float(row[3]) == pytest.approx(logged[-1], abs=1e-3)
    assert float(row[5]) == pytest.approx(np.mean(steps["absolute_metrics"]["win_rate"]), abs=1e-3)
    with pytest.raises(ValueError, match=r"no metric 'wins', but win_rate, return, episode_length"):
        page(tmp_path / "runs", metric="wins")
    monkeypatch.setattr(sys, "argv", ["", "evaluate", str(folder), "--episodes", "8", "--factory", factory])
    evaluate_command()
    assert re.search(r"\n  win_rate: [01]\.\d{3}, 95 % interval", capsys.readouterr().out)


def test_the_score_of_a_run_and_the_spread_over_seeds_are_chosen(tmp_path: Path) -> None:
    finals = np.array([1.0, 2.0, 6.0])
    for method in ("mars", "mappo"):
        for seed, final in enumerate(finals + (method == "mappo")):
            write_run(tmp_path / "runs", f"method={method}", f"seed={seed}", final=float(final))
    start = ("balance", "mars", "0 to 2")
    means = {"best": 3.0, "window:200": 3.0 * (0.75 + 1) / 2}  # curves rise evenly; evaluations every 100 frames
    for score, expected in means.items():
        assert cells(page(tmp_path / "runs", score=score), *start)[6].startswith(f"{expected:.2f} [")
    text = page(tmp_path / "runs", score="window:200", baseline="mappo", spread="std")
    assert cells(text, *start)[3] == f"3.00 ± {finals.std(ddof=1):.2f}"
    assert "(mean of the last 200 frames)" in text
    assert "mean over seeds with its standard deviation" in text
    last = page(tmp_path / "runs", score="last")
    assert cells(last, "task", "method", "seeds") == cells(page(tmp_path / "runs"), "task", "method", "seeds")
    # scores 1, 2, 6 of mars lie between 0 and 7, the highest return of mappo
    assert cells(last, "vmas", "1", "mars", "3")[5].startswith(f"{3 / 7:.2f} [")
    for score in ("mean", "window:0", "window:"):
        with pytest.raises(ValueError, match=rf"A score is absolute, .* or window:FRAMES.*got '{score}'"):
            page(tmp_path / "runs", score=score)
