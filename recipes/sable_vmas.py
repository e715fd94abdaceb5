"""Moved to `mars_vmas.py actor=sable`."""

raise SystemExit("sable_vmas.py has moved: python recipes/mars_vmas.py actor=sable")
