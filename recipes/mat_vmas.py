"""The Multi-Agent Transformer on VMAS, with any ratio loss: agents act one after the other, trained all at once.

    python recipes/mat_vmas.py loss=mars env.scenario=balance actor.num_blocks=2

It is executed centrally: every agent's action depends on all observations and on the actions of agents before it.
The loop is that of mars_vmas.py.
Every value of config/mat_vmas.yaml and every argument of what it names can be overridden; -m runs grids.
"""

from mars_vmas import CONFIG, train

from torchrl_marl.run import recipe

main = recipe(CONFIG, "mat_vmas", unread=("critic", "chunk_length"))(train)

if __name__ == "__main__":
    main()
