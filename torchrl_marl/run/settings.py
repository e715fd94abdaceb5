"""Settings of papers: a table whose rows are choices of ``setting=`` in recipes."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

__all__ = ["check_setting", "read_settings", "store_settings"]


@functools.cache
def read_settings(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of ``folder/settings.csv`` by the name of the setting, ``METHOD/SCENARIO``; empty without a table.

    Columns are dotted keys of the configuration, except ``method``, whose common values are in
    ``folder/setting/METHOD.yaml``, and ``env`` and ``loss``, choices of the groups. An empty cell sets no value.

    Args:
        folder: folder of the recipes' YAML files.
    """
    table = folder / "settings.csv"
    rows = csv.DictReader(table.read_text().splitlines()) if table.exists() else []
    return {f"{row['method']}/{row['env.scenario']}": {k: v for k, v in row.items() if v} for row in rows}


def store_settings(folder: Path, override: str, takes: Callable[[str], bool]) -> None:
    """Register the rows named by an override with Hydra; registering all rows would take half a second per start.

    Args:
        folder: folder of the recipes' YAML files.
        override: a command-line override ``setting=NAME``, or several names.
        takes: whether the recipe supports a choice of ``loss=``.

    Raises:
        SystemExit: if the recipe does not support a row's loss, with the supported settings for the task.
    """
    table, words = read_settings(folder), set(re.findall(r"[\w/-]+", override))
    for name, row in table.items():
        if name not in words:
            continue
        if not takes(loss := _loss_of(folder, row)):
            taken = dict.fromkeys(f"{own['method']}/TASK" for own in table.values() if takes(_loss_of(folder, own)))
            raise SystemExit(
                f"setting={name} is for loss={loss}, which this recipe does not train; of the settings for one task it "
                f"takes {', '.join(taken) or 'none'}."
            )
        values = OmegaConf.from_dotlist([f"{key}={row[key]}" for key in row if key not in ("method", "env", "loss")])
        chosen = [{f"override /{group}": row[group]} for group in ("env", "loss") if group in row]
        defaults = [f"/setting/{row['method']}", "_self_", *chosen]
        group, scenario = f"setting/{row['method']}", row["env.scenario"]
        node = OmegaConf.merge({"defaults": defaults}, values)
        ConfigStore.instance().store(scenario, node, group=group, package="_global_")


def _loss_of(folder: Path, row: Mapping[str, str]) -> str:
    """The choice of ``loss=`` in a row, or else in the common values of its method."""
    return row.get("loss") or _common_loss(folder, row["method"])


@functools.cache
def _common_loss(folder: Path, method: str) -> str:
    entries = OmegaConf.load(folder / "setting" / f"{method}.yaml").defaults
    return next(entry["override /loss"] for entry in entries if "override /loss" in entry)


def check_setting(cfg: DictConfig, choices: Mapping[str, str | None], folder: Path) -> None:
    """End the program if overrides change the method or the task that a setting is tuned for.

    Args:
        cfg: the configuration.
        choices: choices of Hydra's groups.
        folder: folder of the recipes' YAML files.

    Raises:
        SystemExit: with the method and task of the setting.
    """
    name = choices.get("setting") or ""
    if (row := read_settings(folder).get(name)) is None:
        return
    wanted = {"loss": _loss_of(folder, row), "env": row["env"], "env.scenario": row["env.scenario"]}
    found = {**choices, "env.scenario": cfg.env.scenario}
    if changed := [f"{key}={found.get(key)}" for key, value in wanted.items() if found.get(key) != value]:
        takes = " ".join(f"{key}={value}" for key, value in wanted.items())
        raise SystemExit(f"setting={name} is tuned for {takes}; got {' '.join(changed)}.")
