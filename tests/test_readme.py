"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_hand_written_loop_trains(capsys: pytest.CaptureFixture[str]) -> None:
    (loop,) = [block for block in BLOCKS if "Collector(" in block]
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
    (by_hand,) = [block for block in BLOCKS if "Collector(" in block]
    (loop,) = [block for block in BLOCKS if "loss.phases(batch):" in block]
    set_up = by_hand.partition("for batch in collector:")[0]
    set_up = set_up.replace("60_000, 6_000, 10, 1_000", "1_200, 1_200, 2, 600").replace("num_envs=60", "num_envs=12")
    set_up = f"from torchrl_marl.objectives import {loss}\n" + set_up.replace(
        "MARSLoss(actor, critic, target_ratios=(0.5, 2.0), ", f"{loss}(actor, critic, "
    )
    own = "make_actor(env, share_parameters=False)" if loss in ("HAPPOLoss", "OATRPOLoss") else "make_actor(env)"
    names: dict = {}
    exec(compile(set_up.replace("make_actor(env)", own) + loop, "README.md", "exec"), names)
    measured = names["measured"]  # of the last phase, which is the critic's where agents have their own
    assert {name for name in measured if name.startswith("loss_")} >= {"loss_critic"}
    assert all(value.isfinite() for value in measured.values())
    assert measured["critic_grad_norm" if own.endswith("False)") else "grad_norm"] > 0


DOCUMENTS = [
    path for pattern in ("*.md", "docs/*.md", "results/*.md", "benchmarks/**/*.md") for path in ROOT.glob(pattern)
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


def test_the_table_of_methods_is_the_folder_of_choices() -> None:
    listed = set(re.findall(r"\| `loss=(\w+)` \|", README))
    assert listed == {path.stem for path in (ROOT / "recipes/config/loss").glob("*.yaml")}


def test_the_extras_that_are_promised_exist() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    for extra in ("vmas", "wandb", "plot", "jax", "sweep", "export", "video", "scale", "dev"):
        assert re.search(rf"^{extra} = \[", pyproject, flags=re.MULTILINE), extra


def test_the_citation_file_is_valid_yaml() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["preferred-citation"]["title"]
