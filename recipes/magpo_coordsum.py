"""MAGPO and CTDS on CoordSum: learners with a memory follow an autoregressive guider.

    python recipes/magpo_coordsum.py loss.guider_learner_ratio=1.3 loss.rl_coeff=2    # a light setting, 1 M frames
    python recipes/magpo_coordsum.py setting=paper_5x20 loss=ctds                     # the paper's, 20 M frames

The loop is that of magpo_vmas.py, its values are those of config/magpo_coordsum.yaml.
"""

from magpo_vmas import main

if __name__ == "__main__":
    main("magpo_coordsum")
