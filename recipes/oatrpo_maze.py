"""Moved to `oappo_vmas.py +experiment=oappo_maze loss=oatrpo`."""

raise SystemExit("oatrpo_maze.py has moved: python recipes/oappo_vmas.py +experiment=oappo_maze loss=oatrpo")
