"""Moved to `mars_vmas.py actor=mat`."""

raise SystemExit("mat_vmas.py has moved: python recipes/mars_vmas.py actor=mat")
