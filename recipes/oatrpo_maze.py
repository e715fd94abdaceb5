"""OATRPO and HATRPO in the mazes of the off-agent paper.

    python recipes/oatrpo_maze.py loss.kl_threshold=1

The loop is that of oatrpo_vmas.py, its values are those of config/oatrpo_maze.yaml.
"""

from oatrpo_vmas import main

if __name__ == "__main__":
    main("oatrpo_maze")
