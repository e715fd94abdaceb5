"""OAPPO and HAPPO in the mazes of the off-agent paper.

    python recipes/oappo_maze.py env.scenario=black_blue_red loss.reuse_matrix=RR

The loop is that of oappo_vmas.py, its values are those of config/oappo_maze.yaml.
"""

from oappo_vmas import main

if __name__ == "__main__":
    main("oappo_maze")
