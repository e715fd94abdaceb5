"""Compare runs on one page.

    python recipes/compare.py runs/mars_vmas --baseline mappo --output results/vmas

reads every finished run below the folders and writes README.md (with figures), page.html (self-contained) and
evaluations.json (every episode, in marl-eval's layout). Runs of a task must share environment, time limit, budget and
evaluation, and runs of a method must differ only in the seed; otherwise an error lists the differences. A task with
continuous and with discrete actions counts as two tasks.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from torchrl_marl.evaluation.comparison import check_comparable, write_comparison
from torchrl_marl.files import replacing
from torchrl_marl.run.records import merge_records, read_metric, read_runs


def compare(
    roots: Sequence[Path],
    output: Path,
    *,
    baseline: str | None = None,
    split: Sequence[str] = (),
    metric: str = "return",
    score: str = "absolute",
    spread: str = "interval",
    metrics: Sequence[str] = (),
    command: str = "",
) -> None:
    """Read the runs at or below ``roots``, check that they are comparable, and write the page."""
    runs, unfinished = read_runs(roots, split=split, metric=metric)
    for folder in unfinished:
        print(f"{folder} is left out: it is not finished, go on with 'resume=\"{folder}\"'.", file=sys.stderr)
    check_comparable(runs)
    curves = {name: [read_metric(folder, name) for folder in runs.folder] for name in metrics}
    options = {"baseline": baseline, "metric": metric, "score": score, "spread": spread, "command": command}
    write_comparison(runs, output, metrics=curves, unfinished=unfinished, **options)
    records = [(run.folder / "evaluations.json", run.task, run.method) for run in runs.itertuples()]
    if all(path.exists() for path, *_ in records):
        with replacing(output / "evaluations.json") as path:
            path.write_text(json.dumps(merge_records(records)) + "\n")


def main() -> None:
    """Read the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or above them")
    parser.add_argument("--output", type=Path, required=True, help="folder for the page")
    parser.add_argument("--baseline", help="baseline of the probability of improvement")
    parser.add_argument("--split", nargs="*", default=[], metavar="KEY", help="keys that distinguish variants")
    parser.add_argument(
        "--metric", default="return", metavar="NAME", help="metric of the evaluations: return, win_rate, ..."
    )
    parser.add_argument("--score", default="absolute", help="absolute, last, last_fifth, best or window:FRAMES")
    parser.add_argument("--spread", choices=("interval", "std"), default="interval", help="over seeds")
    parser.add_argument(
        "--metrics", nargs="*", default=[], metavar="NAME", help="metrics to draw, such as train/agents/max_ratio"
    )
    arguments = vars(parser.parse_args())
    command = shlex.join(["python", "recipes/compare.py", *sys.argv[1:]])
    try:
        compare(arguments.pop("runs"), **arguments, command=command)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(arguments["output"] / "page.html")


if __name__ == "__main__":
    main()
