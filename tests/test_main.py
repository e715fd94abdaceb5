"""The commands `evaluate` and `export` on a run of a recipe."""

import importlib.util
import logging
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.recipes import runs
from tests.recipes.runs import run_folders, run_recipe
from torchrl_marl.__main__ import main
from torchrl_marl.envs import make_coordsum
from torchrl_marl.evaluation import evaluate
from torchrl_marl.modules import make_mat, make_sable
from torchrl_marl.run.checkpoints import load_policy, read_metadata
from torchrl_marl.shelf import zoo_policies


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        run_recipe(patch, folder, "env=coordsum", "env.scenario=CoordSum-2x5", "total_frames=80", "seed=3")
    return run_folders(folder)[0]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["torchrl_marl", *map(str, arguments)])
    main()


def test_evaluate_prints_the_mean_return_of_the_best_policy_with_its_interval(run: Path, monkeypatch, capsys) -> None:
    call(monkeypatch, "evaluate", run, "--episodes", 20)
    printed = capsys.readouterr().out
    seed = 4_000_012 + 3  # beyond those of training, its evaluations, the absolute metric and the run's film
    env = make_coordsum("CoordSum-2x5", num_envs=20, max_steps=10, seed=seed)
    returns = evaluate(env, load_policy(run), seed=seed, max_steps=10).returns
    mean, low, high = map(float, re.findall(r"return (\S+), 95 % interval (\S+) to (\S+) over 20 episodes", printed)[0])
    assert mean == pytest.approx(returns.mean().item(), abs=1e-3)
    half = 1.96 * returns.std().item() / 20**0.5  # of the mean of many, by the central limit theorem
    assert (high - low) / 2 == pytest.approx(half, rel=0.25)
    assert low < mean < high


def test_sampled_actions_are_those_of_the_seed_and_not_the_most_likely_ones(run: Path, monkeypatch, capsys) -> None:
    seed = 4_000_012 + 3
    env = make_coordsum("CoordSum-2x5", num_envs=20, max_steps=10, seed=seed)
    policy = load_policy(run)
    torch.manual_seed(seed)
    sampled = evaluate(env, policy, seed=seed, max_steps=10, sampled=True).returns
    likely = evaluate(env, policy, seed=seed, max_steps=10).returns
    assert not torch.equal(sampled, likely)
    call(monkeypatch, "evaluate", run, "--episodes", 20, "--sampled")
    assert f"mean return {sampled.mean():.3f}," in (printed := capsys.readouterr().out)
    assert "sampled actions" in printed


def test_evaluate_films_and_export_writes_where_it_is_told(run: Path, tmp_path: Path, monkeypatch) -> None:
    call(monkeypatch, "evaluate", run, "--episodes", 1, "--video", tmp_path / "film.gif")
    assert (tmp_path / "film.gif").read_bytes().startswith(b"GIF")
    call(monkeypatch, "export", run, "--format", "torch_export", "--output", tmp_path / "new" / "policy.pt2")
    assert torch.export.load(tmp_path / "new" / "policy.pt2") is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", 0], "--episodes must be at least 1, got 0"),
        (["--video", "film.avi"], r"path must end in \.gif or \.mp4, got film\.avi"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, run: Path, monkeypatch) -> None:
    with pytest.raises(SystemExit, match=f"^torchrl_marl evaluate: {message}$"):
        call(monkeypatch, "evaluate", run, *arguments)


def test_a_device_that_is_not_there_ends_with_one_line(run: Path, monkeypatch) -> None:
    with pytest.raises(SystemExit, match=r"^device=gpu is not a valid torch device"):
        call(monkeypatch, "evaluate", run, "--device", "gpu")


def test_a_folder_without_a_run_ends_with_one_line(tmp_path: Path, monkeypatch) -> None:
    for command in ("evaluate", "export"):
        with pytest.raises(SystemExit, match=f"^torchrl_marl {command}: No checkpoint at {tmp_path}"):
            call(monkeypatch, command, tmp_path)


@pytest.mark.parametrize("actor", ["mat", "sable"])
def test_a_joint_policy_is_evaluated_and_its_export_refused_in_one_line(actor, tmp_path, monkeypatch, capsys) -> None:
    options = ["env=coordsum", "env.scenario=CoordSum-2x5", f"actor={actor}", "actor.embed_dim=8", "total_frames=80"]
    run_recipe(monkeypatch, tmp_path, *options)
    (folder,) = run_folders(tmp_path)
    capsys.readouterr()
    call(monkeypatch, "evaluate", folder, "--episodes", 20)
    printed = float(re.findall(r"mean return (\S+),", capsys.readouterr().out)[0])
    env = make_coordsum("CoordSum-2x5", num_envs=20, max_steps=10, seed=4_000_012)
    fresh, _ = {"mat": make_mat, "sable": make_sable}[actor](env, embed_dim=8)
    policy = load_policy(folder, actor=fresh)
    assert printed == pytest.approx(evaluate(env, policy, seed=4_000_012, max_steps=10).returns.mean().item(), abs=1e-3)
    with pytest.raises(SystemExit, match=r"^torchrl_marl export: [^\n]*its agents act one after the other$"):
        call(monkeypatch, "export", folder)


OWN_ACTOR = """
from torchrl_marl.modules import make_actor

def make_own(shape, *, width, device=None):
    return make_actor(shape, hidden_sizes=[width], device=device)
"""


def test_an_actor_of_ones_own_is_evaluated_and_exported_once_it_is_named(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "own_actor.py").write_text(OWN_ACTOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["actor._target_=own_actor.make_own", "+actor.width=8"]
    monkeypatch.setattr(runs, "TINY", [word for word in runs.TINY if word != "actor.hidden_sizes=[16]"])
    run_recipe(monkeypatch, tmp_path, "env=coordsum", "env.scenario=CoordSum-2x5", "total_frames=80", *own)
    (folder,) = run_folders(tmp_path)
    for command in (["evaluate", folder], ["export", folder, "--format", "torch_export"]):
        with pytest.raises(SystemExit, match=r"^[^\n]*say --actor own_actor:make_own[^\n]*$"):
            call(monkeypatch, *command)
        call(monkeypatch, *command, "--actor", "own_actor:make_own")
    assert "mean return" in capsys.readouterr().out
    assert (folder / "policy.pt2").exists()
    with pytest.raises(SystemExit, match=r"^torchrl_marl evaluate: own_actor has no callable 'make_mine'"):
        call(monkeypatch, "evaluate", folder, "--actor", "own_actor:make_mine")


def test_a_policy_that_reads_ids_says_what_serves_another_number_of_agents(tmp_path, monkeypatch) -> None:
    env = make_coordsum("CoordSum-3x5", num_envs=4, max_steps=10, seed=0)
    monkeypatch.setattr(runs, "TINY", [*runs.TINY, "env=coordsum", "env.scenario=CoordSum-2x5", "total_frames=80"])
    run_recipe(monkeypatch, tmp_path / "ids")
    run_recipe(monkeypatch, tmp_path / "none", "actor.agent_id=false")
    (ids,), (none,) = (run_folders(tmp_path / name) for name in ("ids", "none"))
    with pytest.raises(ValueError, match=r"^The policy was trained with 2 agents.* got 3: .*actor\.agent_id=false\."):
        evaluate(env, load_policy(ids), seed=0, max_steps=10)
    assert evaluate(env, load_policy(none), seed=0, max_steps=10).returns.shape == (4,)


PACKAGES = {"torchrl_marl.envs.make_jaxmarl": "jaxmarl"}  # that environments of the zoo need and tests may lack


def missing_package(name: str) -> str | None:
    """The package that a policy's environment needs, if it is not installed; without importing it."""
    package = PACKAGES.get(read_metadata(zoo_policies()[name])["config"]["env"]["_target_"])
    return package if package and importlib.util.find_spec(package) is None else None


def test_the_zoo_lists_what_it_has_within_its_size(monkeypatch, capsys) -> None:
    call(monkeypatch, "zoo")
    listed = re.findall(r"^zoo:(\S+) .* return \S+ \[", capsys.readouterr().out, flags=re.MULTILINE)
    assert set(listed) == set(zoo_policies())
    assert sum(path.stat().st_size for path in zoo_policies().values()) < 450_000


@pytest.mark.parametrize("name", zoo_policies())
def test_a_policy_of_the_zoo_scores_what_is_listed(name: str, monkeypatch, capsys) -> None:
    if package := missing_package(name):
        pytest.skip(f"needs {package}")
    call(monkeypatch, "zoo")
    (mean,) = re.findall(rf"^zoo:{name} .* return (\S+) \[", capsys.readouterr().out, flags=re.MULTILINE)
    assert load_policy(f"zoo:{name}") is not None
    call(monkeypatch, "evaluate", f"zoo:{name}", "--episodes", 64)
    found, low, high = re.findall(r"return (\S+), 95 % interval (\S+) to (\S+) over", capsys.readouterr().out)[0]
    assert abs(float(found) - float(mean)) < 3 * (float(high) - float(low))


def test_policies_of_another_build_of_torch_are_evaluated_without_warnings(monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(logging.getLogger("torchrl"), "propagate", True)  # to caplog
    call(monkeypatch, "evaluate", "zoo:navigation/mars", "--episodes", 2)
    assert not caplog.records


def test_policies_of_the_zoo_are_exported_here_and_misspelt_ones_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "export", "zoo:AeroCombat-2v2/maspo", "--format", "torch_export")
    assert (tmp_path / "policy.pt2").exists()  # not beside the checkpoint, in the package
    with pytest.raises(
        SystemExit, match=r"^torchrl_marl evaluate: The zoo has no balance/mapo; nearest: balance/mappo"
    ):
        call(monkeypatch, "evaluate", "zoo:balance/mapo")
