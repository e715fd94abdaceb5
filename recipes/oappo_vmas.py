"""OAPPO, OATRPO, HAPPO and HATRPO on VMAS: agents update sequentially, and learn from agents with similar policies.

    python recipes/oappo_vmas.py                       # loss=happo: from their own experience only
    python recipes/oappo_vmas.py loss.own_weight=0.4 loss.kl_threshold=1 env.scenario=navigation
    python recipes/oappo_vmas.py loss=oatrpo loss.reuse_matrix=AR  # one natural-gradient step per turn; a fixed mapping

The loop is that of mars_vmas.py: `loss.phases` yields the turns of the agents and then the critic's.
Every value of config/oappo_vmas.yaml and every argument of the classes it names can be overridden; -m runs grids.
"""

from torchrl_marl.run.names import check_names

if __name__ == "__main__":
    check_names(__file__)  # a misspelt name is answered before the imports below, which take seconds

from mars_vmas import CONFIG, train

from torchrl_marl.run import recipe

main = recipe(CONFIG, "oappo_vmas")(train)

if __name__ == "__main__":
    main()
