"""The command line, ``torchrl-marl`` or ``python -m torchrl_marl``: run recipes, and evaluate and export runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torchrl_marl
from torchrl_marl.shelf import copy_recipe, print_recipes, run_recipe

_SCRIPTS = {"train": "mars_vmas", "compare": "compare", "tune": "tune"}  # commands that run a recipe


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torchrl-marl", description=__doc__)
    parser.add_argument("--version", action="version", version=f"torchrl_marl {torchrl_marl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list recipes, methods, environments and experiments")
    commands.add_parser("zoo", help="list trained policies that come with the package, RUN of evaluate and export")
    copied = commands.add_parser("cp", help="copy a recipe with its configuration, to edit it")
    copied.add_argument("recipe")
    copied.add_argument("folder", type=Path, nargs="?", default=Path())
    commands.add_parser("run", help="run a recipe: run RECIPE overrides...")
    for command, recipe in _SCRIPTS.items():
        commands.add_parser(command, help=f"short for run {recipe}")
    run = argparse.ArgumentParser(add_help=False)
    run.add_argument(
        "run", metavar="RUN", type=Path, help="folder of a run (its best checkpoint), a checkpoint, zoo:NAME"
    )
    run.add_argument("--actor", metavar="MODULE:CALLABLE", help="builds an actor that is not this library's")
    played = commands.add_parser("evaluate", parents=[run], help="play episodes, print the return, film one")
    played.add_argument("--episodes", type=int, default=100)
    played.add_argument("--sampled", action="store_true", help="sample actions instead of taking the most likely ones")
    played.add_argument(
        "--video", type=Path, metavar="FILE", help="record a video of one episode: FILE.mp4 or FILE.gif"
    )
    played.add_argument("--seed", type=int, help="seed of the environment; by default one that the run has not used")
    played.add_argument("--device", default="cpu")
    played.add_argument("--factory", metavar="MODULE:CALLABLE", help="env.factory of a run with a custom environment")
    exported = commands.add_parser("export", parents=[run], help="write the policy as one file")
    exported.add_argument("--format", default="onnx", help="onnx (default) or torch_export")
    exported.add_argument("--group", help="name of the group, if the run has several")
    exported.add_argument("--agent", type=int, help="export the policy of one agent; by default of the group")
    exported.add_argument("--output", type=Path, metavar="FILE", help="by default policy.onnx or .pt2 in the run")
    checked = commands.add_parser("check", help="describe your own environment and list missing entries")
    checked.add_argument("factory", metavar="MODULE:CALLABLE", help="value of env.factory=... in recipes")
    checked.add_argument(
        "--group-by", metavar="HOW", help="value of env.group_by=... in recipes: name, spaces, padding or {...}"
    )
    return parser


def main() -> None:
    """Run the command line; errors end the program with one line."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "run" and arguments:
        command, *arguments = arguments
    elif command not in _SCRIPTS:
        return _follow(_parser().parse_args([command, *arguments]))
    return run_recipe(_SCRIPTS.get(command, command), arguments)


def _follow(args: argparse.Namespace) -> None:
    if args.command not in ("ls", "cp"):
        from torchrl_marl.commands import follow  # takes seconds: what trains and plays

        return follow(args)
    try:
        print_recipes() if args.command == "ls" else print(*copy_recipe(args.recipe, args.folder), sep="\n")
    except (OSError, ValueError) as error:
        raise SystemExit(f"torchrl_marl {args.command}: {error}") from error


if __name__ == "__main__":
    main()
