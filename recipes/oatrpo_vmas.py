"""OATRPO and HATRPO on VMAS: one natural-gradient step for each agent.

    python recipes/oatrpo_vmas.py loss.max_kl=0.005 loss.reuse_matrix=AR env.scenario=navigation

The loop is that of oappo_vmas.py, its values are those of config/oatrpo_vmas.yaml.
"""

from oappo_vmas import main

if __name__ == "__main__":
    main("oatrpo_vmas")
