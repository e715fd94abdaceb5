"""Every method has a search space, for recipes/tune.py and for W&B."""

import json
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import instantiate
from omegaconf import DictConfig

from tests.recipes.runs import METHODS as ON_POLICY
from tests.recipes.runs import RECIPE_OF, RECIPES, VALUE_BASED, curves, run_folders, run_recipe
from torchrl_marl.modules import GroupSpec
from torchrl_marl.run.checks import check_keys
from torchrl_marl.run.logger import LAST_FIFTH

pytest.importorskip("optuna")

from recipes.tune import SPACES, main

CONFIG = RECIPES / "config"
METHODS = sorted([*ON_POLICY, *VALUE_BASED])


def composed(method: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose(RECIPE_OF[method], overrides=list(overrides), return_hydra_config=True)


def space_of(method: str) -> list[Override]:
    networks = SPACES["networks"]["guider"]["sable"] if RECIPE_OF[method] == "magpo_vmas" else {}
    own = SPACES["methods"].get(method, SPACES["methods"]["default"])
    shared = SPACES["shared_of"].get(RECIPE_OF[method], SPACES["shared"])
    params = {**shared, **{k.format("guider"): v for k, v in networks.items()}, **own}
    return OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])


def printed_sweep(method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict:
    recipe = RECIPE_OF[method]
    monkeypatch.setattr("sys.argv", ["tune.py", recipe, f"loss={method}", "env.scenario=balance", "--wandb"])
    monkeypatch.syspath_prepend(str(RECIPES))
    main()
    return yaml.safe_load(capsys.readouterr().out)


def test_every_space_is_a_methods() -> None:
    assert set(SPACES["methods"]) <= {"default", *METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_tuned_with_equal_budget(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [override for override in space_of(method) if override.is_interval_sweep()]
    assert own
    assert printed_sweep(method, capsys, monkeypatch)["run_cap"] == 40 * len(own)
    assert len(set(SPACES["seeds"])) == 5
    assert not set(SPACES["seeds"]) & set(range(100))  # those that results are reported on


@pytest.mark.parametrize("end", ["start", "end"])
@pytest.mark.parametrize("method", METHODS)
def test_both_ends_of_every_space_are_arguments_that_the_loss_takes(method: str, end: str) -> None:
    chosen = []
    for override in space_of(method):
        value = override.value()
        if override.is_interval_sweep():
            value = getattr(value, end)
        elif override.is_discrete_sweep():
            value = list(override.sweep_iterator())[0 if end == "start" else -1]
        chosen.append(f"++{override.key_or_group}={value}")
    config = composed(method, f"loss={method}", *chosen)
    check_keys(
        DictConfig({"loss": config.loss, "optimizer": config.optimizer}), DictConfig({"loss": 0, "optimizer": 0})
    )
    assert {override.key_or_group.split(".")[0] for override in space_of(method)} <= set(config)
    shape = GroupSpec(name="agents", num_agents=2, observation_size=4, num_actions=3)
    guider, actor = config.get("guider"), instantiate(config.actor, shape)
    if method in VALUE_BASED:
        networks = (actor, shape)
    else:
        networks = (*instantiate(guider, shape), actor) if guider else (actor, instantiate(config.critic, shape))
    instantiate(config.loss, *networks)


@pytest.mark.parametrize("method", METHODS)
def test_the_sweep_of_wandb_searches_the_same_space_for_a_metric_that_runs_log(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = printed_sweep(method, capsys, monkeypatch)
    assert set(sweep) == {"program", "command", "method", "run_cap", "metric", "parameters"}
    assert sweep["method"] == "bayes"
    assert sweep["metric"] == {"name": LAST_FIFTH, "goal": "maximize"}
    command = ["${env}", "python", "${program}", f"loss={method}", "env.scenario=balance"]
    assert set(command) | {"evaluation.video=False", "seed=1000"} <= set(sweep["command"])
    assert [sweep["command"][index] for index in (0, 1, 2, -1)] == [*command[:3], "${args_no_hyphens}"]
    assert sweep["program"] == f"recipes/{RECIPE_OF.get(method, 'mars_vmas')}.py"
    written = {}
    for key, value in sweep["parameters"].items():
        if "values" in value:
            written[key] = ("values", value["values"])
        else:
            written[key] = ("log" if "distribution" in value else "linear", value["min"], value["max"])
    expected = {}
    for override in space_of(method):
        value = override.value()
        if override.is_interval_sweep():
            expected[override.key_or_group] = ("log" if "log" in value.tags else "linear", value.start, value.end)
        elif override.is_discrete_sweep():
            expected[override.key_or_group] = ("values", list(override.sweep_iterator()))
    assert written == expected


def test_a_run_logs_the_metric_that_sweeps_maximise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path)
    (folder,) = run_folders(tmp_path)
    (row,) = curves(folder)[LAST_FIFTH].split()
    summary = json.loads((folder / "summary.json").read_text())
    assert [float(value) for value in row.split(",")] == pytest.approx([240, summary["last_fifth"]])


@pytest.mark.parametrize(
    ("overrides", "searched"),
    [
        (["actor=mat"], {"actor.embed_dim", "actor.num_heads", "actor.num_blocks"}),
        (["actor=sable"], {"actor.embed_dim", "actor.num_heads", "actor.num_blocks", "actor.decay_scaling"}),
        (["actor=gru", "critic=gru"], {"chunk_length"}),
    ],
    ids=["mat", "sable", "gru"],
)
def test_widths_of_networks_are_searched_where_there_are_such_networks(
    overrides: list[str],
    searched: set[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["tune.py", "mars_vmas", "loss=mappo", *overrides, "--wandb"])
    monkeypatch.syspath_prepend(str(RECIPES))
    main()
    sweep = yaml.safe_load(capsys.readouterr().out)
    plain = {override.key_or_group for override in space_of("mappo") if override.is_sweep_override()}
    assert set(sweep["parameters"]) == plain | searched
    assert sweep["run_cap"] == 40  # as without them: equal budgets
