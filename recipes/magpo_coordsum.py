"""Moved to `magpo_vmas.py +experiment=magpo_coordsum`."""

raise SystemExit("magpo_coordsum.py has moved: python recipes/magpo_vmas.py +experiment=magpo_coordsum")
