"""Texts: a checkpoint folder as a module, a smaller one that starts from it, padding that is none.

What transformers makes of the same folder is compared where it is installed.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cloud_learner.train.blocks_text import TextNetwork
from edge_runtime.errors import ConfigError
from edge_runtime.features.feature import Padding

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


@pytest.fixture
def folder(tmp_path, write_bert):
    """A checkpoint folder whose weights are random."""
    write_bert(tmp_path, CONFIG, 0.2)
    return tmp_path


def texts(*lengths, columns=12):
    random = np.random.default_rng(len(lengths))
    rows = random.integers(1, 50, (len(lengths), columns)).astype(np.float32)
    rows[np.arange(columns) >= np.array(lengths)[:, None]] = 0
    return torch.from_numpy(rows)


def loaded(folder, length=12, pad=0):
    torch.manual_seed(1)
    return TextNetwork.from_folder(folder, 5, Padding(length, pad)).eval()


def test_an_encoder_is_what_transformers_makes_of_the_folder(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    rows = texts(3, 12, 7)
    mask = (rows != 0).float()
    with torch.no_grad():
        states = theirs(input_ids=rows.long(), attention_mask=mask).last_hidden_state
        expected = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

        assert torch.allclose(expected, loaded(folder).mean(rows), atol=1e-5)


def test_an_answer_depends_on_neither_padding_nor_other_rows(folder):
    network, rows = loaded(folder), texts(3, 12, 7)
    with torch.no_grad():
        together = network(rows)
        apart = torch.cat([network(rows[at : at + 1, :length]) for at, length in ((0, 3), (1, 12))])

    assert together.shape == (3, 5)
    assert torch.allclose(together[:2], apart, atol=1e-6)


def test_a_row_of_padding_alone_has_an_answer(folder):
    with torch.no_grad():
        assert torch.isfinite(loaded(folder)(texts(0, 4))).all()


def test_words_make_a_difference_and_so_does_their_order(folder):
    network, row = loaded(folder), texts(8)
    other = row.clone()
    other[0, [2, 3]] = row[0, [3, 2]]
    with torch.no_grad():
        assert not torch.allclose(network(row), network(other), atol=1e-6)


def test_a_shorter_network_starts_from_layers_of_the_longer(folder):
    network = loaded(folder)
    small = network.shortened([0, -1], 24, CONFIG["intermediate_size"]).eval()
    rows = texts(5, 9)
    with torch.no_grad():
        network.layers = torch.nn.ModuleList([network.layers[0], network.layers[-1]])

        assert torch.allclose(network(rows), small(rows), atol=1e-4)


def test_a_narrow_table_is_the_best_of_its_width(folder):
    network = loaded(folder)
    small = network.shortened([0], 10, 6)
    with torch.no_grad():
        found = small.projection(small.token_embedding.weight)
        values = torch.linalg.svdvals(network.token_embedding.weight)

    assert small.token_embedding.weight.shape == (50, 10)
    gap = float(torch.linalg.norm(network.token_embedding.weight.detach() - found))
    assert gap == pytest.approx(float(values[10:].norm()), rel=1e-3)


def test_a_narrow_feed_forward_network_keeps_the_units_that_do_most(folder):
    network = loaded(folder)
    layer = network.layers[0]
    with torch.no_grad():
        layer.intermediate.weight[::2] = 0  # they see nothing, and what they say is in the bias
        layer.intermediate.bias[::2] = 0
    half = CONFIG["intermediate_size"] // 2
    small = network.shortened([0], 24, half).eval()
    network.layers = torch.nn.ModuleList([layer])
    with torch.no_grad():
        assert torch.allclose(network(texts(5, 9)), small(texts(5, 9)), atol=1e-4)
    assert small.layers[0].intermediate.weight.tolist() == layer.intermediate.weight[1::2].tolist()


def test_lengths_are_those_before_the_padding(folder):
    assert loaded(folder).lengths(texts(3, 12, 0, 7)).tolist() == [3, 12, 0, 7]


def test_every_weight_learns(folder):
    network = loaded(folder).shortened([0, 1], 8, 6)
    network(texts(6, 6, 6)).square().sum().backward()

    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b"{", "config.json"),
        ("config.json", json.dumps({**CONFIG, "model_type": "gpt2"}).encode(), "'gpt2'"),
        ("config.json", json.dumps({**CONFIG, "hidden_size": 32}).encode(), "does not fit"),
        ("config.json", json.dumps({**CONFIG, "num_hidden_layers": 4}).encode(), "does not fit"),
        ("config.json", json.dumps({**CONFIG, "hidden_size": -1}).encode(), "hidden_size"),
        ("config.json", json.dumps({**CONFIG, "vocab_size": 10**12}).encode(), "vocab_size"),
        ("config.json", json.dumps({**CONFIG, "num_attention_heads": 5}).encode(), "5 heads"),
        (
            "config.json",
            json.dumps({**CONFIG, "position_embedding_type": "relative_key"}).encode(),
            "'relative_key'",
        ),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", "does not fit"),
        ("model.safetensors", b"", "does not fit"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0{}", "does not fit"),
        ("model.safetensors", b"\xff" * 40, "does not fit"),
    ],
)
def test_a_folder_that_holds_no_such_network_is_refused(folder, file, content, said):
    (folder / file).write_bytes(content)

    with pytest.raises(ConfigError, match=said) as caught:
        loaded(folder)
    assert caught.value.code == "bad_checkpoint"


def test_a_longer_text_than_the_checkpoint_has_places_for_is_refused(folder):
    with pytest.raises(ConfigError) as caught:
        loaded(folder, length=21)
    assert caught.value.code == "bad_checkpoint"
    assert "20 positions, for texts of 21" in caught.value.message


def test_a_tokenizer_with_another_padding_is_refused(folder):
    with pytest.raises(ConfigError, match="padding has the id 0, and 1 by the tokenizer"):
        loaded(folder, pad=1)


def test_weights_of_half_precision_are_read(folder):
    whole = loaded(folder).state_dict()
    path = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)

    for name, tensor in loaded(folder).state_dict().items():
        assert torch.allclose(tensor, whole[name], atol=2e-3)
