"""What is written is complete or not there, and a disk that fills up says how to go on."""

import sys
from pathlib import Path

import pytest

from tests.recipes.runs import run_folders, run_recipe
from torchrl_marl.files import replacing

FULL = OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    for written in ("", "half"):
        with pytest.raises(OSError, match="No space"):
            write_and_fail(path, written)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("summary.json", "old")]
    with replacing(path) as new:
        assert new.suffix == path.suffix  # by which Matplotlib, Pillow and ffmpeg choose what to write
        new.write_text("new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("summary.json", "new")]


def write_and_fail(path: Path, text: str) -> None:
    with replacing(path) as new:
        new.write_text(text)
        raise FULL


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "config.yaml").symlink_to(tmp_path / "mine")
    with replacing(tmp_path / "config.yaml") as new:
        new.write_text("new")
    assert ((tmp_path / "mine").read_text(), (tmp_path / "config.yaml").read_text()) == ("mine", "new")


def fill_disk(patch: pytest.MonkeyPatch, suffix: str) -> None:
    """Let files of a kind be opened, and every further byte fail."""
    own = Path.write_text

    def write_text(path: Path, text: str) -> int:
        if path.name.endswith(suffix):
            path.touch()
            raise FULL
        return own(path, text)

    def save(figure: object, path: Path, **_: object) -> None:
        path.touch()
        raise FULL

    patch.setattr(Path, "write_text", write_text)
    if suffix == ".png":
        patch.setattr("matplotlib.figure.Figure.savefig", save)


def test_a_disk_that_is_full_at_the_end_names_the_last_good_checkpoint(tmp_path: Path, monkeypatch) -> None:
    fill_disk(monkeypatch, "summary.json")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    message = r"Stopped after 80 frames\. OSError: .*No space left on device\. Last good checkpoint: .*torchrl\. Go on"
    with pytest.raises(RuntimeError, match=message):
        run_recipe(monkeypatch, tmp_path, "env=coordsum", "env.scenario=CoordSum-2x5", "total_frames=80")
    assert not [file for file in run_folders(tmp_path)[0].iterdir() if "summary" in file.name]


def test_a_picture_that_the_disk_has_no_room_for_is_not_there_at_all(tmp_path: Path, monkeypatch) -> None:
    fill_disk(monkeypatch, ".png")
    with pytest.warns(UserWarning, match="it has no learning curve: OSError"):
        run_recipe(monkeypatch, tmp_path, "env=coordsum", "env.scenario=CoordSum-2x5", "total_frames=80")
    assert not [file for file in run_folders(tmp_path)[0].iterdir() if "png" in file.name]


def test_a_run_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r'no learning curve: .*matplotlib.*: pip install "torchrl_marl\[plot\]"$'):
        run_recipe(monkeypatch, tmp_path, "env=coordsum", "env.scenario=CoordSum-2x5", "total_frames=80")
