"""The Multi-Agent Transformer against the numbers of an independent implementation."""

import pytest
import torch
from torch.testing import assert_close

from tests.modules.vectors import VECTORS, double, load
from torchrl_marl.modules import GroupSpec, make_mat

VECTOR = VECTORS["mat_discrete"]


def load_norm(layer, values):
    load(layer, weight=values["s"], bias=values["b"])


def load_attention(layer, values):
    for name, entry in (("to_query", "q"), ("to_key", "k"), ("to_value", "v"), ("to_output", "p")):
        load(getattr(layer, name), weight=values[f"{entry}_w"], bias=values[f"{entry}_b"])


def load_mlp(mlp, values):
    load(mlp[0], weight=values["w1"], bias=values["b1"]), load(mlp[2], weight=values["w2"], bias=values["b2"])


def load_head(head, values):
    load(head[0], weight=values["h_w1"], bias=values["h_b1"]), load_norm(head[2], values["h_ln"])
    load(head[3], weight=values["h_w2"], bias=values["h_b2"])


@pytest.fixture
def network():
    """Encoder, decoder and head of values with the parameters of the vectors."""
    config = VECTOR["config"]
    shape = GroupSpec("agents", 3, 1, num_actions=config["action_dim"])  # with an agent id of three: 4 inputs
    actor, critic = make_mat(shape, embed_dim=config["embed"], num_heads=config["n_head"], num_blocks=config["n_block"])
    actor.double(), critic.double()
    encoder, decoder = actor[0].encoder, actor[0].decoder
    values = VECTOR["params"]["enc"]
    load_norm(encoder.embed[0], values["obs_ln"]), load_norm(encoder.embed[3], values["ln"])
    load(encoder.embed[1], weight=values["obs_w"], bias=values["obs_b"])
    load_head(critic.head, values)
    for block, entry in zip(encoder.blocks, values["blocks"], strict=True):
        load_attention(block.attention, entry["attn"]), load_mlp(block.mlp, entry["mlp"])
        load_norm(block.norm1, entry["ln1"]), load_norm(block.norm2, entry["ln2"])
    values = VECTOR["params"]["dec"]
    load(decoder.embed[0], weight=values["act_w"]), load_norm(decoder.embed[2], values["ln"])
    load_head(decoder.head, values)
    for block, entry in zip(decoder.blocks, values["blocks"], strict=True):
        load_attention(block.attention, entry["attn1"]), load_attention(block.cross_attention, entry["attn2"])
        load_mlp(block.mlp, entry["mlp"])
        for index in (1, 2, 3):
            load_norm(getattr(block, f"norm{index}"), entry[f"ln{index}"])
    return encoder, decoder, critic.head


def test_values_and_known_actions_are_those_of_the_authors(network):
    encoder, decoder, head = network
    action, legal = torch.tensor(VECTOR["action"]), torch.tensor(VECTOR["legal"]).bool()
    encoding = encoder(double(VECTOR["obs"]), {})
    assert_close(head(encoding).squeeze(-1), double(VECTOR["expected_value"]), rtol=0, atol=1e-9)
    previous = torch.cat([torch.zeros(2, 1, dtype=torch.long), action[:, :-1] + 1], 1)
    log_prob = decoder(encoding, previous, {}).masked_fill(~legal, -torch.inf).log_softmax(-1)
    assert_close(log_prob[legal], double(VECTOR["expected_log_softmax"])[legal], rtol=0, atol=1e-9)
    chosen = log_prob.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    assert_close(chosen, double(VECTOR["expected_log_prob"]), rtol=0, atol=1e-9)
