"""Sable against an independent implementation's numbers, and the forms of its retention against each other."""

import pytest
import torch
from torch.testing import assert_close

from tests.modules.vectors import VECTORS, double, load
from torchrl_marl.modules import GroupSpec, make_sable
from torchrl_marl.modules.sable import positional_encoding, retention, retention_decay, retention_weights

EXACT = {"rtol": 0, "atol": 1e-9}  # float64; the vectors have ten decimals or more


# --- pure functions


@pytest.mark.parametrize("case", list(VECTORS["kappa_table"]))
def test_decay_is_that_of_the_authors(case):
    heads, scaling = (part.split("=")[1] for part in case.split(","))
    assert_close(retention_decay(int(heads), scaling=float(scaling)), torch.tensor(VECTORS["kappa_table"][case]))


def test_positional_encoding_is_that_of_the_authors():
    vector = VECTORS["positional_encoding"]
    encoded = positional_encoding(double(vector["steps"]), vector["d_model"])
    assert_close(encoded, double(vector["expected"]), rtol=0, atol=1e-6)


def head_inputs():
    """Queries, keys and values of one head ``[B, 1, T, N, D]``, the initial state and the resets."""
    vector = VECTORS["retention_head"]
    agents = vector["n_agents"]
    inputs = [
        (double(vector[x]) @ double(vector[f"w{x}"])).unflatten(1, (-1, agents)).unsqueeze(1) for x in ("q", "k", "v")
    ]
    return vector, inputs, double(vector["h0"]).unsqueeze(1), torch.tensor(vector["dones"], dtype=torch.bool)


@pytest.mark.parametrize(("causal", "case"), [(False, "encoder_full"), (True, "decoder_causal")])
@pytest.mark.parametrize("chunk_size", [1, 5])
def test_retention_is_that_of_the_authors(causal, case, chunk_size):
    vector, inputs, state, reset = head_inputs()
    weights = retention_weights(
        reset, double([vector["kappa"]]), num_agents=vector["n_agents"], causal=causal, chunk_size=chunk_size
    )
    output, states = retention(*inputs, state, weights)
    expected = vector[case]
    assert_close(output.flatten(2, 3).squeeze(1), double(expected["expected_out"]), **EXACT)
    assert_close(states[:, 0, -1], double(expected["expected_h_after"]), **EXACT)
    if chunk_size == 1:
        assert_close(states[:, 0, 1], double(expected["expected_h_after_first_chunk_of_2_steps"]), **EXACT)


def random_head(steps=12, agents=3, resets=(0, 5, 6, 11)):
    """Queries, keys and values of two heads, the initial state, resets of the second sequence, decays; float64."""
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(2, 2, steps, agents, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    state = torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64)
    reset = torch.zeros(2, steps, dtype=torch.bool)
    reset[1, list(resets)] = True
    return inputs, state, reset, double([0.9, 0.5])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 6])
def test_chunks_of_any_size_give_the_values_and_gradients_of_the_parallel_form(causal, chunk_size):
    inputs, state, reset, decay = random_head()
    results = []
    for size in (12, chunk_size):
        leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
        weights = retention_weights(reset, decay, num_agents=3, causal=causal, chunk_size=size)
        output, states = retention(*leaves, weights)
        final = states[:, :, -1]
        gradient = torch.autograd.grad(output.pow(3).sum() + final.pow(3).sum(), leaves)
        results.append((output, final, *gradient))
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_retention_is_the_recurrence_written_down_agent_by_agent(causal):
    (query, key, value), state, reset, decay = random_head()
    weights = retention_weights(reset, decay, num_agents=3, causal=causal, chunk_size=4)
    output, states = retention(query, key, value, state, weights)
    for t in range(12):
        state = decay[:, None, None] * torch.where(reset[:, t, None, None, None], 0.0, state)
        outer = key[:, :, t].unsqueeze(-1) * value[:, :, t].unsqueeze(-2)
        for agent in range(3):
            seen = outer[:, :, : agent + 1] if causal else outer
            expected = torch.einsum("bhd,bhde->bhe", query[:, :, t, agent], state + seen.sum(2))
            assert_close(output[:, :, t, agent], expected, rtol=1e-9, atol=1e-9)
        state = state + outer.sum(2)
        if t % 4 == 3:
            assert_close(states[:, :, t // 4], state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 4, 12])
def test_nothing_from_before_a_reset_reaches_what_comes_after_it(chunk_size):
    inputs, state, reset, decay = random_head(resets=(5,))
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    weights = retention_weights(reset, decay, num_agents=3, causal=False, chunk_size=chunk_size)
    output, states = retention(*leaves, weights)
    *gradients, of_state = torch.autograd.grad(output[1, :, 5:].sum() + states[1, :, -1].sum(), leaves)
    assert not of_state[1].any()
    for gradient in gradients:
        assert not gradient[1, :, :5].any()
    assert all(gradient[1, :, 5:].any() for gradient in gradients[1:])
    without = torch.autograd.grad(retention(*leaves, weights)[0][0, :, 5:].sum(), leaves)
    assert all(gradient[0, :, :5].any() for gradient in without[1:3])  # in the sequence that is not reset it does


def test_chunks_that_do_not_fill_a_sequence_raise():
    with pytest.raises(ValueError, match="Chunks of 5 steps do not fill sequences of 12: choose a divisor of 12"):
        retention_weights(torch.zeros(1, 12), torch.ones(1), num_agents=2, causal=True, chunk_size=5)


# --- whole networks


def load_retention(layer, vector):
    heads = {x: torch.cat(list(double(vector[f"w{x}"])), -1) for x in "qkv"}
    load(layer.to_query, weight=heads["q"].tolist())
    load(layer.to_key_value_gate, weight=torch.cat([heads["k"], heads["v"], double(vector["wg"])], -1).tolist())
    load(layer.to_output, weight=vector["wo"])
    load(layer.norm, weight=vector["gn_s"], bias=vector["gn_b"])


def load_feed_forward(layer, vector):
    for name, entry in (("gate", "gate"), ("linear", "lin"), ("output", "out")):
        load(getattr(layer, name), weight=vector[entry])


def load_head(head, vector):
    load(head[0], weight=vector["h_w1"], bias=vector["h_b1"])
    load(head[2], weight=vector["h_ln"])
    load(head[3], weight=vector["h_w2"], bias=vector["h_b2"])


@pytest.fixture
def network():
    """The network of the vectors: encoder, decoder, head of values."""
    vector = VECTORS["sable_discrete"]
    config = vector["config"]
    shape = GroupSpec("agents", 2, 1, num_actions=config["action_dim"])  # with an agent id of two: 3 inputs
    actor, critic = make_sable(
        shape,
        embed_dim=config["embed"],
        num_heads=config["n_head"],
        num_blocks=config["n_block"],
        decay_scaling=config["decay_scaling"],
        feed_forward=True,
    )
    actor.double(), critic.double()
    encoder, decoder, head = actor[0].encoder, actor[0].decoder, critic.head
    encoder.decay, decoder.decay = double(config["kappa"]), double(config["kappa"])
    parameters = vector["params"]["enc"]
    load(encoder.embed[0], weight=parameters["obs_ln"])
    load(encoder.embed[1], weight=parameters["obs_w"])
    load(encoder.norm, weight=parameters["ln"])
    load_head(head, parameters)
    for block, values in zip(encoder.blocks, parameters["blocks"], strict=True):
        load_retention(block.retention, values["retn"])
        load(block.norm1, weight=values["ln1"]), load(block.norm2, weight=values["ln2"])
        load_feed_forward(block.feed_forward, values["ffn"])
    parameters = vector["params"]["dec"]
    load(decoder.embed[0], weight=parameters["act_w"])
    load(decoder.embed[2], weight=parameters["ln"])
    load_head(decoder.head, parameters)
    for block, values in zip(decoder.blocks, parameters["blocks"], strict=True):
        load_retention(block.retention, values["retn1"]), load_retention(block.cross_retention, values["retn2"])
        for index in (1, 2, 3):
            load(getattr(block, f"norm{index}"), weight=values[f"ln{index}"])
        load_feed_forward(block.feed_forward, values["ffn"])
    return encoder, decoder, head


def sequence():
    """Observations, known actions, legal actions and the state before each step; step 0 where the vector resets."""
    vector = VECTORS["sable_discrete"]
    step = torch.tensor(vector["steps"]).long()
    assert torch.equal(step == 0, torch.tensor(vector["dones"], dtype=torch.bool))
    state = {
        "encoder_memory": double(vector["h_enc"]).transpose(1, 2),  # blocks before heads
        "decoder_memory": torch.stack([double(vector[h]).transpose(1, 2) for h in ("h_self", "h_cross")], 1),
        "step": step.unsqueeze(-1),
    }
    return double(vector["obs"]), torch.tensor(vector["action"]), torch.tensor(vector["legal"]).bool(), state


def test_training_pass_is_that_of_the_authors(network):
    encoder, decoder, head = network
    observation, action, legal, state = sequence()
    vector = VECTORS["sable_discrete"]
    encoding = encoder(observation, state)
    assert_close(head(encoding).squeeze(-1), double(vector["expected_value"]), rtol=0, atol=1e-6)
    previous = torch.cat([torch.zeros(2, 4, 1, dtype=torch.long), action[..., :-1] + 1], -1)
    logits = decoder(encoding, previous, state).masked_fill(~legal, -torch.inf)
    log_prob = logits.log_softmax(-1)
    assert_close(log_prob[legal], double(vector["expected_log_softmax"])[legal], rtol=0, atol=1e-6)
    chosen = log_prob.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    assert_close(chosen, double(vector["expected_log_prob"]), rtol=0, atol=1e-6)
    entropy = torch.distributions.Categorical(logits=logits.masked_fill(~legal, -1e30)).entropy()
    assert_close(entropy, double(vector["expected_entropy"]), rtol=0, atol=1e-6)


@torch.no_grad()
def test_acting_pass_is_that_of_the_authors(network):
    encoder, decoder, head = network
    observation, action, legal, state = sequence()
    vector = VECTORS["sable_discrete"]
    steps = state["step"]
    for t in range(4):
        state["step"] = steps[:, t]
        encoding, encoder_state = encoder.act(observation[:, t], state)
        taken = []

        def choose(agent, output, t=t, taken=taken):
            taken.append(output.masked_fill(~legal[:, t, agent], -torch.inf).log_softmax(-1))
            return action[:, t, agent] + 1

        _, decoder_state = decoder.act(encoding, torch.zeros(2, dtype=torch.long), choose, state)
        assert_close(head(encoding).squeeze(-1), double(vector["expected_value"])[:, t], rtol=0, atol=1e-6)
        expected = double(vector["expected_log_softmax"])[:, t]
        assert_close(torch.stack(taken, 1)[legal[:, t]], expected[legal[:, t]], rtol=0, atol=1e-6)
        assert torch.equal(decoder_state["step"], steps[:, t] + 1)
        state = {**state, **encoder_state, **decoder_state}
    final = [state["encoder_memory"], *state["decoder_memory"].unbind(1)]
    for memory, name in zip(final, ("enc", "self", "cross"), strict=True):
        assert_close(memory.transpose(1, 2), double(vector[f"expected_final_h_{name}"]), rtol=0, atol=1e-6)
