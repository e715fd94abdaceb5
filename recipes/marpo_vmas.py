"""MARPO and RPO on VMAS: every row of a batch also holds the agent's next step.

    python recipes/marpo_vmas.py                       # loss=rpo: fixed clips; loss=mappo: the same without reflection
    python recipes/marpo_vmas.py loss.reflection_coeff=0.1 loss.layout=paper env.scenario=balance

The loop is that of mars_vmas.py: `loss.prepare` adds the next step.
Every value of config/marpo_vmas.yaml and every argument of the classes it names can be overridden; -m runs grids.
"""

from torchrl_marl.run.names import check_names

if __name__ == "__main__":
    check_names(__file__)  # a misspelt name is answered before the imports below, which take seconds

from mars_vmas import CONFIG, train

from torchrl_marl.run import recipe

main = recipe(CONFIG, "marpo_vmas")(train)

if __name__ == "__main__":
    main()
