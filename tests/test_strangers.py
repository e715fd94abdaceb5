"""Folders and files of a stranger: every command that reads a run, nothing executed, one line that says why.

``docs/trust.md`` has the table of what is tried here on which command.
"""

import json
import os
import runpy
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from tensordict import NonTensorData, TensorDict

from examples.seeds import words_of_seeds
from tests.recipes.runs import RECIPES, run_folders, run_recipe
from tests.run.test_checkpoints import Malice, component_member, rewrite
from torchrl_marl.__main__ import main
from torchrl_marl.run.checkpoints import find_checkpoint, load_policy, read_metadata
from torchrl_marl.run.config import _stored_config
from torchrl_marl.run.logger import MetricLog
from torchrl_marl.run.records import EvaluationRecord
from torchrl_marl.trust import foreign_code

MKDIR = {"_target_": "os.mkdir"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        run_recipe(patch, folder, "env=coordsum", "env.scenario=CoordSum-2x5", "total_frames=80")
    return run_folders(folder)[0]


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "stranger")


@pytest.fixture
def proof(tmp_path: Path) -> Iterator[Path]:
    """What every attack makes if anything of it is executed."""
    OmegaConf.register_new_resolver("mkdir", os.mkdir)
    yield tmp_path / "executed"
    OmegaConf.clear_resolver("mkdir")


def call_load_policy(run: Path, patch: pytest.MonkeyPatch, *_: str) -> None:
    load_policy(run)


def call_evaluate(run: Path, patch: pytest.MonkeyPatch, *more: str) -> None:
    patch.setattr(sys, "argv", ["torchrl_marl", "evaluate", str(run), "--episodes", "2", *more])
    main()


def call_export(run: Path, patch: pytest.MonkeyPatch, *more: str) -> None:
    patch.setattr(sys, "argv", ["torchrl_marl", "export", str(run), "--format", "torch_export", *more])
    main()


def call_resume(run: Path, patch: pytest.MonkeyPatch, *more: str) -> None:
    patch.setattr("tests.recipes.runs.TINY", [])
    patch.setenv("HYDRA_FULL_ERROR", "1")
    run_recipe(patch, run.parent / "unused", f"resume={run}", *more)


def call_compare(run: Path, patch: pytest.MonkeyPatch, *more: str) -> None:
    patch.setattr(sys, "argv", ["compare.py", str(run), "--output", str(run.parent / "page"), *more])
    runpy.run_path(str(RECIPES / "compare.py"), run_name="__main__")


READERS = [call_load_policy, call_evaluate, call_export, call_resume]


def refusal(command: Callable[..., None], run: Path, patch: pytest.MonkeyPatch, *more: str) -> str:
    with pytest.raises((SystemExit, ValueError)) as refused:
        command(run, patch, *more)
    message = str(refused.value)
    assert "\n" not in message
    return message


def reconfigure(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the configuration that the run's checkpoints hold."""
    for path in (run / "checkpoints").iterdir():
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read("manifest.json"))
        change(manifest["metadata"]["config"])
        rewrite(path, {"manifest.json": json.dumps(manifest).encode()})


def pickle_in_archive(run: Path, proof: Path) -> None:
    torch.save(Malice(proof), run / "evil.pt")
    for path in (run / "checkpoints").iterdir():
        for part in ("actor", "loss", "optimizer"):
            rewrite(path, {component_member(path, part): (run / "evil.pt").read_bytes()})


def pickle_in_torch_file(run: Path, proof: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        torch.save(Malice(proof), path)


def pickle_in_folder(run: Path, proof: Path, newest: bool = False) -> None:
    """A checkpoint that TorchRL takes: a folder, with a memory-mapped TensorDict whose field is a pickle."""
    path = find_checkpoint(run)
    folder = path.with_name("checkpoint-000000000999") if newest else path.with_suffix("")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    payload = TensorDict({"evil": NonTensorData(Malice(proof))}, batch_size=[])
    for member in list(folder.rglob("state.pt")):
        payload.save(member.parent / "state")
        member.unlink()
    for other in [] if newest else list((run / "checkpoints").glob("*.torchrl")):
        other.unlink()


def payload_in_archive(run: Path, proof: Path) -> None:
    """The same within an archive."""
    pickle_in_folder(run, proof)
    (folder,) = (run / "checkpoints").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    for record in manifest["components"].values():
        path = folder / record["path"]
        record["files"] = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with zipfile.ZipFile(folder.with_suffix(".torchrl"), "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("attack", [pickle_in_archive, pickle_in_torch_file, pickle_in_folder, payload_in_archive])
@pytest.mark.filterwarnings("ignore")  # tensordict warns of a pickle before it executes it
def test_a_pickle_in_whatever_lies_there_is_refused(attack, command, run: Path, proof: Path, monkeypatch) -> None:
    attack(run, proof)
    assert "checkpoint-" in refusal(command, run, monkeypatch)
    assert not proof.exists()


@pytest.mark.parametrize("command", [call_load_policy, call_evaluate, call_export])
def test_a_folder_beside_good_checkpoints_is_passed_over_with_a_warning(
    command, run: Path, proof: Path, monkeypatch
) -> None:
    pickle_in_folder(run, proof, newest=True)
    with pytest.warns(UserWarning, match=r"checkpoint-000000000999 is no file.* Passed over, \S+\.torchrl is used"):
        command(run, monkeypatch)
    assert not proof.exists()


def test_a_folder_among_the_checkpoints_of_a_run_that_goes_on_is_put_aside(run: Path, proof: Path, monkeypatch) -> None:
    pickle_in_folder(run, proof, newest=True)
    with pytest.warns(UserWarning, match="checkpoint-000000000999 is no file"):
        call_resume(run, monkeypatch, "total_frames=160")
    assert (run / "abandoned/checkpoint-000000000999").is_dir()
    assert read_metadata(find_checkpoint(run))["frames"] == 160
    assert not proof.exists()


def at(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the configuration: ``value`` at a dotted key."""

    def change(config: dict[str, Any]) -> None:
        *nodes, last = key.split(".")
        for node in nodes:
            config = config.setdefault(node, {})
        config[last] = value

    return change


CODE = [
    ("env", MKDIR),
    ("env._args_", ["os:mkdir"]),
    ("env.scenario", MKDIR),
    ("env.scenario_kwargs", {"deep": [{"er": MKDIR}]}),
    ("env.package", "antigravity"),
    ("env.num_envs", {"_target_": "torchrl_marl.modules.make_actor"}),  # ours, but not there
    ("env._target_", "torchrl_marl.envs.wrappers.custom.importlib.import_module"),
    ("env._target_", "torchrl_marl.envs.render_episode"),
]
CODE_OF_TRAINING = [
    ("actor", MKDIR),
    ("actor.hidden_sizes", [MKDIR]),
    ("critic.value_norm", MKDIR),
    ("loss", MKDIR),
    ("loss.gain", {"_target_": "builtins.exec"}),
    ("loss.target_ratios", {"_target_": "torchrl_marl.objectives.MARSLoss"}),
    ("optimizer", MKDIR),
    ("optimizer._target_", "torch.optim.adam.os.mkdir"),
    ("collector", MKDIR),
    ("collector.address", "ray://203.0.113.1:10001"),
    ("collector.resources", {"runtime_env": {"pip": ["12345"]}}),
    ("collector.make_env", {"_target_": "hydra.utils.instantiate", "config": {}, "factory": "os:mkdir"}),
    ("collector.make_env", {"_target_": "hydra.utils.instantiate", "config": MKDIR}),
    ("logger.wandb_tags", [MKDIR]),
    ("hydra", MKDIR),
    ("_target_", "os.mkdir"),
]


def call_stored_config(run: Path, patch: pytest.MonkeyPatch, *_: str) -> None:
    """What ``resume=`` begins with, without composing a configuration before."""
    _stored_config(str(run), [])


@pytest.mark.parametrize(
    ("command", "key", "value"),
    [(call_evaluate, *case) for case in CODE]
    + [(call_stored_config, *case) for case in CODE + CODE_OF_TRAINING]
    + [(call_resume, "env.scenario_kwargs", {"deep": [{"er": MKDIR}]}), (call_resume, "loss", MKDIR)],
)
def test_code_that_a_configuration_names_is_not_even_imported(
    command, key: str, value: Any, run: Path, proof: Path, monkeypatch
) -> None:
    text = json.dumps(value).replace(json.dumps(MKDIR), json.dumps({**MKDIR, "path": str(proof)}))
    reconfigure(run, at(key, json.loads(text)))
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    assert "names code that is not this library's" in refusal(command, run, monkeypatch)
    assert not proof.exists()
    assert "antigravity" not in sys.modules


def with_factory(proof: Path) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config["env"] = {"_target_": "torchrl_marl.envs.make_custom", "factory": "os:mkdir", "scenario": "mine"}
        config["env"] |= {"num_envs": 8, "max_steps": 10, "factory_kwargs": {"path": str(proof)}}

    return change


@pytest.mark.parametrize(
    ("command", "again"), [(call_evaluate, "--factory os:mkdir"), (call_resume, "env.factory=os:mkdir")]
)
def test_a_factory_is_called_only_if_it_is_said_again(command, again, run: Path, proof: Path, monkeypatch) -> None:
    reconfigure(run, with_factory(proof))
    assert again in refusal(command, run, monkeypatch)
    assert not proof.exists()
    with pytest.raises((SystemExit, InstantiationException), match="os:mkdir returned NoneType"):
        command(run, monkeypatch, *again.split())
    assert proof.exists()  # what the attack does where nobody refuses it


def test_another_factory_than_the_stored_one_can_be_said_to_evaluate_and_not_to_go_on(
    run: Path, proof: Path, monkeypatch
) -> None:
    reconfigure(run, with_factory(proof))
    assert "there is no module 'nowhere'" in refusal(call_evaluate, run, monkeypatch, "--factory", "nowhere:make")
    assert "keeps its env.factory" in refusal(call_resume, run, monkeypatch, "env.factory=nowhere:make")
    assert not proof.exists()


@pytest.mark.parametrize("command", [call_evaluate, call_stored_config])
@pytest.mark.parametrize("key", ["env.scenario", "env.factory_kwargs.path"])
def test_an_interpolation_is_not_resolved(key: str, command, run: Path, proof: Path, monkeypatch) -> None:
    reconfigure(run, at(key, f"${{mkdir:{proof}}}"))
    assert f"{key} is " in refusal(command, run, monkeypatch)
    assert not proof.exists()
    OmegaConf.to_container(OmegaConf.create([f"${{mkdir:{proof}}}"]), resolve=True)  # where somebody resolves it
    assert proof.exists()


def linked(kind: str, run: Path, outside: Path) -> Path:
    """Put a link into a run's folder, or in place of a part of it; return what then is resumed."""
    if kind == "a checkpoint":
        path = find_checkpoint(run)
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)
        return path
    if kind == "a checkpoint elsewhere":
        (outside / "mine.torchrl").symlink_to(find_checkpoint(run))
        return outside / "mine.torchrl"
    part = {"its checkpoints": "checkpoints", "its curves": "metrics.csv", "a file": "config.yaml"}.get(kind, "new")
    if part != "new":
        (run / part).rename(outside / "part")
    (run / part).symlink_to(outside / "part")
    return run


@pytest.mark.parametrize(
    "kind", ["a checkpoint", "a checkpoint elsewhere", "its checkpoints", "its curves", "a file", "a dangling name"]
)
def test_a_run_does_not_go_on_through_a_link(kind: str, run: Path, tmp_path: Path, monkeypatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    resumed = linked(kind, run, outside)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    assert "link" in refusal(call_resume, resumed, monkeypatch, "total_frames=160")
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before


def test_seeds_do_not_go_on_together_through_a_link(run: Path, tmp_path: Path) -> None:
    newest = find_checkpoint(run)
    with zipfile.ZipFile(newest) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    manifest["metadata"]["trained_with"] = [run.name, "other"]
    rewrite(newest, {"manifest.json": json.dumps(manifest).encode()})
    other = shutil.copytree(run, run.parent / "other")
    again = [f"resume={newest}"]
    assert len(words_of_seeds(again)) == 2
    (other / "summary.json").unlink()
    (other / "summary.json").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"summary\.json is a link out of the run's folder"):
        words_of_seeds(again)


@pytest.mark.parametrize("row", ["frames,1.0\n", "<b>\n", "\n80,1.0\n", "80\n"])
@pytest.mark.parametrize("header", ["counters/total_frames,x\n", ""])
def test_a_curve_of_anything_else_is_named(header: str, row: str, run: Path) -> None:
    (run / "metrics.csv").write_text(header + row)
    with pytest.raises(ValueError, match=r"metrics\.csv does not hold rows of frames and value"):
        MetricLog(run, config={}, name="", group="", tags=(), run_id="a", resumed_at=80, wandb_project=None)


def test_links_of_wandb_and_within_the_folder_are_no_hindrance(run: Path, tmp_path: Path) -> None:
    (run / "wandb").mkdir()
    (run / "wandb" / "debug.log").symlink_to(tmp_path / "cache")
    (run / "latest").symlink_to(find_checkpoint(run))
    (tmp_path / "mine").symlink_to(run)  # a user's own name for the folder
    assert _stored_config(str(tmp_path / "mine"), []).seed == 0


def test_a_read_only_folder_is_named_before_anything_is_built(run: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(run))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    message = refusal(call_resume, run, monkeypatch)
    assert f"{run} cannot be written to: [Errno 30] Read-only file system" in message
    monkeypatch.setattr("torch.export.save", refuse)
    assert "Read-only file system" in refusal(call_export, run, monkeypatch)
    assert not list(run.glob("*policy*"))


def configure(run: Path, text: Callable[[str], str]) -> None:
    (run / "config.yaml").write_text(text((run / "config.yaml").read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [{proof}]",
        "seed: !!python/object/apply:os.mkdir [{proof}]",
        "- a list",
        "a: [",
        "",
    ],
)
def test_compare_names_a_configuration_that_is_none(text: str, run: Path, proof: Path, monkeypatch) -> None:
    configure(run, lambda _: text.format(proof=proof))
    assert f"{run} cannot be read as a finished run" in refusal(call_compare, run, monkeypatch)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name in ("summary.json", "evaluations.json") for content in ("[1]", "{", "[" * 10_000)]
    + [("summary.json", "{}"), ("evaluations.json", '{"vmas": 1}'), ("config.yaml", "env: {scenario: a}")],
)
def test_compare_names_files_that_are_not_a_runs(name: str, content: str, run: Path, monkeypatch) -> None:
    (run / name).write_text(content)
    assert str(run) in refusal(call_compare, run, monkeypatch)


@pytest.mark.parametrize("content", ["[1]", "{", "{}"])
def test_a_run_does_not_go_on_with_evaluations_that_are_not_its_own(content: str, run: Path) -> None:
    (run / "evaluations.json").write_text(content)
    own = {"environment": "vmas", "task": "balance", "method": "mars", "seed": 0}
    with pytest.raises(ValueError, match=r"evaluations\.json does not hold the evaluations of this run: "):
        EvaluationRecord(run / "evaluations.json", **own, resumed_at=80)


def test_a_page_of_a_strangers_names_is_plain_text_and_resolves_nothing(run: Path, proof: Path, monkeypatch) -> None:
    evil = "<img src=x onerror=alert(1)>[a](javascript:b) $\\frac$ $"
    configure(run, lambda text: text.replace("method: mars", f"method: '{evil}'"))
    configure(run, lambda text: text.replace("device: cpu", f"device: '${{mkdir:{proof}}}'"))
    call_compare(run, monkeypatch, "--split", "device")
    page = (run.parent / "page/page.html").read_text()
    assert f"${{mkdir:{proof}}}" in page  # as it is written
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    for text in (page, (run.parent / "page/README.md").read_text()):
        assert "<img src=x" not in text
    assert "[a](" not in (run.parent / "page/README.md").read_text()
    assert not proof.exists()


def test_every_target_of_the_recipes_is_allowed_where_they_name_it() -> None:
    """An installed package has no recipes; what may be stored follows from names, and this holds the two together."""
    for path in (RECIPES / "config").rglob("*.yaml"):
        config = OmegaConf.to_container(OmegaConf.load(path))
        group = path.parent.name
        if group != "config" and "@package _global_" not in path.read_text():
            config = {group: config}
        plain = json.loads(json.dumps(config).replace("${", ""))
        plain.get("collector", {}).get("make_env", {}).pop("config", None)
        assert foreign_code(plain) == {}, path
