"""Moved to `mars_vmas.py +experiment=mappo_maze`."""

raise SystemExit("mappo_maze.py has moved: python recipes/mars_vmas.py +experiment=mappo_maze")
