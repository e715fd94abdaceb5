"""MAPPO with one policy for all in the mazes of the off-agent paper.

    python recipes/mappo_maze.py env.scenario=black_blue_red seed=3

The loop is that of mars_vmas.py, its values are those of config/mappo_maze.yaml.
"""

from mars_vmas import main

if __name__ == "__main__":
    main("mappo_maze")
