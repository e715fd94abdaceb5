"""Sable on VMAS, with any ratio loss: like MAT, with a memory of constant size over the whole episode.

    python recipes/sable_vmas.py loss=mars env.scenario=balance actor.num_blocks=2

It is executed centrally. Minibatches are whole sequences, each trained from the memory before its first step.
The loop is that of mars_vmas.py.
Every value of config/sable_vmas.yaml and every argument of what it names can be overridden; -m runs grids.
"""

from mars_vmas import CONFIG, train

from torchrl_marl.run import recipe

main = recipe(CONFIG, "sable_vmas", collectors=("sequences",), unread=("critic", "chunk_length"))(train)

if __name__ == "__main__":
    main()
