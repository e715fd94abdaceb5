"""OATRPO and HATRPO in the mazes of the off-agent paper.

    python recipes/oatrpo_maze.py loss.kl_threshold=1

The loop is that of oappo_vmas.py, its values are those of config/oatrpo_maze.yaml.
"""

from oappo_vmas import main

if __name__ == "__main__":
    main("oatrpo_maze")
