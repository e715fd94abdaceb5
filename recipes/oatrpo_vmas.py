"""Moved to `oappo_vmas.py loss=oatrpo`."""

raise SystemExit("oatrpo_vmas.py has moved: python recipes/oappo_vmas.py loss=oatrpo")
