"""Settings of papers: every row of the authors' table is a choice, says what the table says, and fits its recipe."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.recipes.runs import RECIPES, run_recipe
from torchrl_marl.run.config import Recipe
from torchrl_marl.run.settings import read_settings

AUTHORS = list(csv.DictReader((Path(__file__).parent / "magpo_params.csv").read_text().splitlines()))
CONFIG = RECIPES / "config"
SUITES = {
    "coordsum": ("coordsum", "CoordSum-"),
    "mpe": ("jaxmarl", ""),
    "smax": ("jaxmarl", "smax-"),
    "lbf": ("jumanji", "lbf-"),
    "connector": ("jumanji", ""),
    "rware": ("jumanji", "rware-"),
}
LIMITS = {"coordsum": 100, "mpe": 26, "smax": 100, "lbf": 100, "rware": 500}  # connector: the number of cells
LOSSES = {"mat": "MAPPOLoss", "sable": "MAPPOLoss"}  # what Sable and MAT are is their network
NETWORK = {
    "n_embd": "embed_dim",
    "n_head": "num_heads",
    "n_block": "num_blocks",
    "decay_scaling_factor": "decay_scaling",
}


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recipe]:
    """The recipes that train what the table has, by the methods of their settings."""
    monkeypatch.syspath_prepend(str(RECIPES))
    guided, others = (importlib.import_module(name).main for name in ("magpo_vmas", "mars_vmas"))
    return dict.fromkeys(("magpo", "ctds"), guided) | dict.fromkeys(("happo", "mappo", "ippo", "mat", "sable"), others)


def name_of(row: dict[str, str]) -> str:
    """A row's setting: the method, and the scenario as our environments call it."""
    return f"{row['system_name']}/{SUITES[row['env_name']][1]}{row['task']}"


def described(cfg: DictConfig, method: str) -> dict[str, float | None]:
    """A configuration in the columns of the authors' table."""
    guided, loss, critic = method in ("magpo", "ctds"), cfg.loss, cfg.get("critic") or {}
    joint = cfg.guider if guided else cfg.actor if method in ("mat", "sable") else {}
    recurrent = method in ("happo", "mappo", "ippo")
    assert joint.get("value_norm") is critic.get("value_norm") is None
    return {
        "num_minibatches": cfg.frames_per_batch / cfg.minibatch_size,
        "max_grad_norm": cfg.max_grad_norm,
        "ppo_epochs": cfg.epochs,
        "clip_eps": loss.clip_epsilon,
        "recurrent_chunk_size": cfg.chunk_length if recurrent else None,
        "ent_coef": loss.entropy_coeff,
        "num_envs": cfg.env.num_envs / 2,  # of two replicas
        "num_updates": cfg.total_frames / cfg.frames_per_batch,
        "num_evaluation": cfg.total_frames / cfg.evaluation.interval,
        "alpha": loss.get("rl_coeff"),
        "delta": loss.get("guider_learner_ratio"),
        "actor_lr": cfg.optimizer.lr,
        "critic_lr": cfg.optimizer.lr,
        **{column: joint.get(key) for column, key in NETWORK.items()},
    }


def numbers(row: dict[str, str]) -> dict[str, float | None]:
    """A row's numbers; of two learning rates one may be missing, where one network has both roles."""
    found = {key: float(value) if value.strip() else None for key, value in row.items() if key not in TEXT}
    rates = [found[key] for key in ("actor_lr", "critic_lr") if found[key] is not None]
    return found | {"actor_lr": rates[0], "critic_lr": rates[-1]}


TEXT = ("system_name", "task", "env_name")
FIRST = {(row["system_name"], row["env_name"]): row for row in AUTHORS}  # one of each method and suite


def rates_apart(row: dict[str, str]) -> bool:
    return len({value for key, value in row.items() if key.endswith("_lr") and value}) > 1


def test_the_authors_table_has_all_tasks_and_one_learning_rate_a_row() -> None:
    tasks = {method: {row["task"] for row in AUTHORS if row["system_name"] == method} for method in ("magpo", "happo")}
    assert tasks["magpo"] == tasks["happo"]
    assert len(tasks["magpo"]) == 43
    assert not any(map(rates_apart, AUTHORS))


def test_every_row_is_a_setting_and_every_setting_a_row() -> None:
    names = {name_of(row) for row in AUTHORS}
    imitating = {name.replace("magpo/", "ctds/") for name in names if name.startswith("magpo/")}
    assert {name for name in read_settings(CONFIG) if not name.startswith("tuned/")} == names | imitating


def said(name: str) -> DictConfig:
    """What a setting says by itself: its method's common values and its row."""
    common = OmegaConf.load(CONFIG / "setting" / f"{name.partition('/')[0]}.yaml")
    row = {key: value for key, value in read_settings(CONFIG)[name].items() if key not in ("method", "env")}
    return DictConfig(OmegaConf.merge(common, OmegaConf.from_dotlist([f"{key}={row[key]}" for key in row])))


@pytest.mark.parametrize("row", AUTHORS, ids=name_of)
def test_a_setting_is_what_the_authors_tuned(row: dict[str, str]) -> None:
    cfg = said(name_of(row))
    assert described(cfg, row["system_name"]) == pytest.approx(numbers(row))
    assert f"{row['system_name']}/{cfg.env.scenario}" == name_of(row)
    cells = int(row["task"].split("-")[1].split("x")[0]) ** 2 if row["env_name"] == "connector" else None
    assert cfg.env.max_steps == (cells or LIMITS[row["env_name"]])


@pytest.mark.parametrize("row", FIRST.values(), ids=name_of)
def test_a_recipe_takes_all_that_a_setting_says(row: dict[str, str], recipes: dict[str, Recipe]) -> None:
    method, name = row["system_name"], name_of(row)
    cfg = recipes[method].compose([f"setting={name}"])
    assert described(cfg, method) == pytest.approx(numbers(row))
    assert cfg.loss._target_.rpartition(".")[2] == LOSSES.get(method, f"{method.upper()}Loss")
    assert cfg.env._target_ == OmegaConf.load(CONFIG / f"env/{SUITES[row['env_name']][0]}.yaml")._target_
    own = said(name)
    del own["defaults"]
    plain = DictConfig(OmegaConf.to_container(own, resolve=True))
    assert OmegaConf.merge(cfg, plain) == cfg  # nothing of it is overridden


def test_the_imitating_students_of_a_task_have_magpos_setting_without_its_own_two(recipes: dict[str, Recipe]) -> None:
    task = "rware-xlarge-4ag-hard"
    ctds, magpo = (recipes[method].compose([f"setting={method}/{task}"]) for method in ("ctds", "magpo"))
    own = {"_target_", "guider_learner_ratio", "rl_coeff"}
    assert {key: ctds.loss[key] for key in ctds.loss if key not in own} == {
        key: magpo.loss[key] for key in magpo.loss if key not in own
    }
    assert not {"guider_learner_ratio", "rl_coeff"} & set(ctds.loss)
    rest = [{key: cfg[key] for key in cfg if key not in ("loss", "method")} for cfg in (ctds, magpo)]
    assert rest[0] == rest[1]


def test_what_the_authors_have_for_all_tasks(recipes: dict[str, Recipe]) -> None:
    """Rectifiers, halves of half the squares, values clipped as ratios are, agents shuffled for the guider."""
    magpo, happo = (
        recipes["magpo"].compose(["setting=magpo/smax-2s3z"]),
        recipes["happo"].compose(["setting=happo/con-5x5x3a"]),
    )
    for cfg in (magpo, happo):
        assert cfg.actor.activation == "relu"
        assert "recurrent" in cfg.actor._target_
        assert (cfg.loss.loss_critic_type, cfg.loss.critic_coeff) == ("l2", 0.25)
        assert cfg.loss.clip_value == cfg.loss.clip_epsilon
        assert (cfg.gamma, cfg.lmbda) == (0.99, 0.95)
        assert cfg.frames_per_batch == 128 * cfg.env.num_envs
    assert magpo.loss.shuffle_agents
    assert happo.critic.activation == "relu"
    assert not happo.actor.share_parameters


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("mars", {"max_grad_norm": 0.5, "lmbda": 0.95, "gamma": 0.99, "loss.critic_coeff": 0.25}),
        ("marpo", {"total_frames": 10_000_000, "loss.kl_bias": 0.08, "loss.ema_rate": 0.08}),
        ("oappo", {"loss.own_weight": 0.7, "loss.kl_threshold": 0.1}),
    ],
)
def test_values_that_papers_state_are_settings(
    setting: str, values: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("mars_vmas" if setting == "mars" else f"{setting}_vmas").main
    cfg = recipe.compose([f"setting={setting}"])
    assert {key: OmegaConf.select(cfg, key) for key in values} == values
    assert setting != "mars" or cfg.frames_per_batch == 128 * cfg.env.num_envs


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "mars_vmas",
            ["setting=magpo/smax-2s3z"],
            "is for loss=magpo, which this recipe does not .*takes happo/TASK, mappo",
        ),
        ("magpo_vmas", ["setting=happo/smax-2s3z"], "is for loss=happo, .*takes magpo/TASK, ctds/TASK"),
        ("magpo_vmas", ["setting=magpo/CoordSum-9x9"], "is not a choice; nearest: setting=magpo/CoordSum-"),
        ("magpo_vmas", ["setting=magpo/CoordSum-3x10", "env=maze"], "is tuned for .*env=coordsum.*; got env=maze"),
        (
            "magpo_vmas",
            ["setting=magpo/CoordSum-3x10", "env.scenario=CoordSum-5x20"],
            "is tuned for .*env.scenario=CoordSum-3x10; got",
        ),
        ("magpo_vmas", ["setting=magpo/CoordSum-3x10", "loss=ctds"], "is tuned for loss=magpo .*; got loss=ctds"),
        ("marpo_vmas", ["setting=tuned/reverse_transport", "loss=rpo"], "is tuned for loss=marpo .*; got loss=rpo"),
        ("magpo_vmas", ["setting=tuned/balance"], "is for loss=mars, which this recipe does not .*takes magpo/TASK"),
    ],
)
def test_a_setting_of_another_method_or_task_is_refused_with_what_it_is_for(
    recipe: str, overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    with pytest.raises(SystemExit, match=f"^{overrides[0]} {message}"):
        run_recipe(monkeypatch, tmp_path, *overrides, recipe=recipe)


def test_a_setting_whose_extra_is_missing_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    monkeypatch.setitem(sys.modules, "jumanji", None)
    with pytest.raises(SystemExit, match=r'^env: .*pip install "torchrl_marl\[jax\]"'):
        run_recipe(monkeypatch, tmp_path, "setting=happo/lbf-10x10-3p-3f", "device=cpu")


@pytest.mark.parametrize(
    ("file", "task", "recipe", "method"),
    [
        ("tuning", "balance", "mars_vmas", "mars"),
        ("tuning", "balance", "oappo_vmas", "mars"),  # whose own loss is another one
        ("tuning", "navigation", "mars_vmas", "mars"),
        ("plan_tuning", "reverse_transport", "marpo_vmas", "marpo"),
    ],
)
def test_a_tuned_setting_is_what_tuning_has_chosen(
    file: str, task: str, recipe: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = json.loads((RECIPES.parent / f"results/{file}.json").read_text())[task]["last_fifth"]
    of_method = [command for command in tried if f"loss={method} " in command]
    _, *chosen = max(of_method, key=lambda command: tried[command]).split()
    monkeypatch.syspath_prepend(str(RECIPES))
    main: Recipe = importlib.import_module(recipe).main
    assert main.compose([*chosen, f"method={method}"]) == main.compose([f"setting=tuned/{task}", f"method={method}"])
