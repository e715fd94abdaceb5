"""Moved to `oappo_vmas.py +experiment=oappo_maze`."""

raise SystemExit("oappo_maze.py has moved: python recipes/oappo_vmas.py +experiment=oappo_maze")
