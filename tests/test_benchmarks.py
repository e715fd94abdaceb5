"""What lies in benchmarks/ can be run: a rename in the package that forgets a script is noticed here."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = {"benchmarl", "jax", "jaxmarl", "jumanji", "matplotlib"}  # not installed with the package


@pytest.mark.parametrize("name", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_a_scripts_imports_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as Python does for a script
    try:
        runpy.run_path(str(BENCHMARKS / name), run_name="imported")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in PEERS:
            raise
        pytest.skip(str(error))
