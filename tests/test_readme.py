"""The code of the README and of docs/loops.md runs as printed."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LOOPS = (ROOT / "docs/loops.md").read_text()


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)


def test_the_hand_written_loop_trains(capsys: pytest.CaptureFixture[str]) -> None:
    loop, *_ = blocks(LOOPS)
    sizes = "total_frames, frames_per_batch, epochs, minibatch_size = 60_000, 6_000, 10, 1_000"
    assert sizes in loop
    loop = loop.replace(sizes, "total_frames, frames_per_batch, epochs, minibatch_size = 12_000, 6_000, 2, 1_000")
    exec(compile(loop, "README.md", "exec"), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("return ")]
    assert len(lines) == 2
    smallest, largest = (float(number) for number in re.findall(r"ratios ([\d.]+) to ([\d.]+)", lines[-1])[0])
    assert smallest < 1 < largest


@pytest.mark.parametrize("loss", ["MARSLoss", "MARPOLoss", "HAPPOLoss", "OATRPOLoss"])
def test_the_loop_of_every_method_trains_each(loss: str) -> None:
    (loop,) = blocks(README)
    loop = loop.replace("60_000, 6_000, 10, 1_000", "1_200, 1_200, 2, 600").replace("num_envs=60", "num_envs=12")
    loop = loop.replace("import MARSLoss", f"import {loss}")
    loop = loop.replace("MARSLoss(actor, critic, target_ratios=(0.5, 2.0), ", f"{loss}(actor, critic, ")
    sequential = loss in ("HAPPOLoss", "OATRPOLoss")
    if sequential:  # the last phase is the critic's, which has no ratio
        loop = loop.replace("make_actor(env)", "make_actor(env, share_parameters=False)")
        loop = loop.partition("    returns =")[0]
    names: dict = {}
    exec(compile(loop, "README.md", "exec"), names)
    measured = names["measured"]
    assert {name for name in measured if name.startswith("loss_")} >= {"loss_critic"}
    assert all(value.isfinite() for value in measured.values())
    assert measured["critic_grad_norm" if sequential else "grad_norm"] > 0


@pytest.mark.parametrize("network", ["make_recurrent_actor", "make_sable"])
def test_the_loops_of_other_networks_train(network: str) -> None:
    (loop,) = [block for block in blocks(LOOPS) if network in block]
    names: dict = {}
    exec(compile(loop, "docs/loops.md", "exec"), names)
    losses = {name for name in names["measured"] if name.startswith("loss_")}
    assert losses >= ({"loss_objective", "loss_learner_kl"} if network == "make_sable" else {"loss_objective"})
    assert all(value.isfinite() for value in names["measured"].values())


def test_a_gain_of_ones_own_trains_with_losses_of_two_families() -> None:
    (example,) = blocks((ROOT / "docs/method.md").read_text())
    names: dict = {}
    exec(compile(example, "docs/method.md", "exec"), names)
    log_ratio = torch.tensor([0.0, 10.0, -10.0])
    gain = names["tanh_gain"](log_ratio, torch.ones(3), low=0.8, high=1.2)
    assert_close(gain, torch.tensor([1.0, 1.2, 1 + 0.2 * math.tanh((math.exp(-10) - 1) / 0.2)]))
    assert names["loss"].gain is names["sequential"].gain is names["tanh_gain"]


DOCUMENTS = [
    path for pattern in ("*.md", "docs/**/*.md", "results/*.md", "benchmarks/**/*.md") for path in ROOT.glob(pattern)
]


def anchors(document: Path) -> set[str]:
    """What headings can be linked by: small letters, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_that_a_document_links_to_exists(document: Path) -> None:
    targets = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', document.read_text())
    local = [target for pair in targets for target in pair if target and "://" not in target]
    for target in local:
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_choices_of_methods_are_those_of_the_table_or_of_the_changelog() -> None:
    table = README.partition("## Methods")[2].partition("## Environments")[0]
    rows = re.findall(r"^\| \[.*\| (`\w+`(?:, `\w+`)*) \|.*\|$", table, flags=re.MULTILINE)
    listed = {choice for row in rows for choice in re.findall(r"\w+", row)}
    choices = {path.stem for path in (ROOT / "recipes/config/loss").glob("*.yaml")}
    assert listed <= choices
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert all(f"`loss={choice}`" in changes for choice in choices - listed)


def test_the_extras_that_are_promised_exist() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    for extra in ("vmas", "wandb", "plot", "jax", "tune", "export", "video", "scale", "dev"):
        assert re.search(rf"^{extra} = \[", pyproject, flags=re.MULTILINE), extra


def test_the_citation_file_is_valid_yaml() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["preferred-citation"]["title"]
