"""A building block for texts: a transformer that reads token ids, from a Hugging Face folder.

Why: a pretrained encoder of texts is a folder with config.json and model.safetensors. What a family
needs of it is a module like any other: rows of token ids in, logits out; and a smaller one that
begins with what the larger one knows.

Invariants: rows are float32 ids (batch, length), padded at the end; an answer does not depend on
the padding, nor on the other rows. Trimming it saves time and changes nothing; an exported graph
holds none of it. Nothing is downloaded.

Knows nothing about tasks, losses, tokenizers or training. Reads `model_type = "bert"` (Devlin et
al. 2018); the file format is safetensors', little-endian throughout.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from edge_runtime.errors import ConfigError

_MASKED = -1e4  # after it a softmax gives exactly 0
_LAYER = {
    "attention.output.dense": "mixed",
    "attention.output.LayerNorm": "after_attention",
    "intermediate.dense": "inner",
    "output.dense": "outer",
    "output.LayerNorm": "after_inner",
}


class Shape(msgspec.Struct, frozen=True):
    """What config.json says of an encoder; other keys are ignored."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    model_type: str = ""
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0


class Layer(nn.Module):
    """Self-attention and a perceptron of one hidden layer, each added to what came in."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        width, self.heads = shape.hidden_size, shape.num_attention_heads
        self.attended = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.after_attention = nn.LayerNorm(width, shape.layer_norm_eps)
        self.inner = nn.Linear(width, shape.intermediate_size)
        self.outer = nn.Linear(shape.intermediate_size, width)
        self.after_inner = nn.LayerNorm(width, shape.layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """States (batch, length, width); the mask (batch, 1, 1, length) is added to scores."""
        batch, length, width = states.shape
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.attended(states).chunk(3, dim=2)
        )
        scores = query @ key.transpose(2, 3) * (width // self.heads) ** -0.5 + mask
        seen = (torch.softmax(scores, dim=3) @ value).transpose(1, 2).reshape(batch, length, width)
        states = self.after_attention(states + self.dropout(self.mixed(seen)))
        inner = self.outer(nn.functional.gelu(self.inner(states)))
        found: Tensor = self.after_inner(states + self.dropout(inner))
        return found


class TextNetwork(nn.Module):
    """An encoder, the mean of its last states, and one linear layer over it: (batch, `outputs`)."""

    rates: ClassVar[dict[str, float]] = {"head": 20.0}
    """A head that knows nothing learns faster than an encoder that knows much."""

    def __init__(
        self, shape: Shape, outputs: int, *, word_width: int = 0, dropout: float = 0.1
    ) -> None:
        """A `word_width` makes the table of words that narrow, and a linear layer widens it."""
        super().__init__()
        width, self.pad = shape.hidden_size, shape.pad_token_id
        self.words = nn.Embedding(shape.vocab_size, word_width or width)
        self.widened = nn.Linear(word_width, width, bias=False) if word_width else nn.Identity()
        self.positions = nn.Embedding(shape.max_position_embeddings, width)
        self.after_words = nn.LayerNorm(width, shape.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, outputs)
        self.shape = shape

    @classmethod
    def from_folder(cls, folder: Path, outputs: int, length: int) -> TextNetwork:
        """The encoder of a checkpoint for texts of at most `length` ids, with a new head.

        Raises: ConfigError `bad_checkpoint`.
        """
        shape = _shape(folder)
        network = cls(msgspec.structs.replace(shape, max_position_embeddings=length), outputs)
        try:
            weights = _renamed(tensors(folder / "model.safetensors"), shape, length)
            network.load_state_dict({**network.state_dict(), **weights})
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise _bad(folder, f"model.safetensors does not fit config.json: {error}") from error
        return network

    def shortened(self, layers: list[int], word_width: int, inner_width: int) -> TextNetwork:
        """A smaller network that starts from these layers, and the best table of that width.

        The table is the truncated singular value decomposition of this one's. Of each layer's
        perceptron those hidden units stay whose weights are largest, what goes in times what
        comes out (Han et al. 2015 keep single weights so).
        """
        changed = {"num_hidden_layers": len(layers), "intermediate_size": inner_width}
        shape = msgspec.structs.replace(self.shape, **changed)
        other = TextNetwork(shape, self.head.out_features, word_width=word_width, dropout=0.0)
        other.positions = copy.deepcopy(self.positions)
        other.after_words = copy.deepcopy(self.after_words)
        other.head = copy.deepcopy(self.head)
        for target, at in zip(other.layers, layers, strict=True):
            target.load_state_dict(_narrowed(self.layers[at].state_dict(), inner_width))
        table = self.words.weight.detach()
        values, axes = torch.linalg.eigh(table.T @ table)
        axes = axes[:, values.argsort(descending=True)[:word_width]]
        other.words.load_state_dict({"weight": table @ axes})
        other.widened.load_state_dict({"weight": axes})
        return other

    def forward(self, features: Tensor) -> Tensor:
        """Logits of shape (batch, outputs)."""
        logits: Tensor = self.head(self.dropout(self.mean(features)))
        return logits

    def mean(self, features: Tensor) -> Tensor:
        """The mean of the last states over the tokens, (batch, width)."""
        if not torch.compiler.is_exporting():
            features = features[:, : max(1, int(self.lengths(features).max()))]
        ids = features.long()
        is_word = (ids != self.pad).to(features.dtype)
        states = self.widened(self.words(ids)) + self.positions.weight[: ids.shape[1]]
        states = self.dropout(self.after_words(states))
        mask = (1 - is_word)[:, None, None, :] * _MASKED
        for layer in self.layers:
            states = layer(states, mask)
        count = is_word.sum(1, keepdim=True).clamp(min=1)
        mean: Tensor = (states * is_word[:, :, None]).sum(1) / count
        return mean

    def lengths(self, features: Tensor) -> Tensor:
        """Of each row, how many of its columns come before the padding, (batch,)."""
        places = torch.arange(1, features.shape[1] + 1)
        return ((features != self.pad) * places).amax(1)


def _narrowed(layer: dict[str, Tensor], inner_width: int) -> dict[str, Tensor]:
    """A layer's tensors with so many hidden units in its perceptron, the largest."""
    into, out = layer["inner.weight"], layer["outer.weight"]
    largest = (into.norm(dim=1) * out.norm(dim=0)).topk(inner_width).indices.sort().values
    fewer = {"inner.weight": into[largest], "outer.weight": out[:, largest]}
    return {**layer, **fewer, "inner.bias": layer["inner.bias"][largest]}


def tensors(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file. Raises: OSError, ValueError."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, about in json.loads(content[8:start]).items():
        if about.get("dtype") == "F32":
            first, last = about["data_offsets"]
            values = np.frombuffer(content[start + first : start + last], "<f4")
            found[name] = torch.from_numpy(values.reshape(about["shape"]).copy())
    return found


def _shape(folder: Path) -> Shape:
    try:
        shape = msgspec.json.decode((folder / "config.json").read_bytes(), type=Shape)
    except (OSError, msgspec.DecodeError) as error:
        raise _bad(folder, f"config.json: {error}") from error
    if (shape.model_type, shape.hidden_act) != ("bert", "gelu"):
        raise _bad(
            folder, f"config.json: {shape.model_type!r} with {shape.hidden_act!r} is not read"
        )
    return shape


def _renamed(found: dict[str, Tensor], shape: Shape, length: int) -> dict[str, Tensor]:
    """A checkpoint's tensors by this module's names; of each layer three matrices become one."""
    found = {name.removeprefix("bert."): tensor for name, tensor in found.items()}
    table = "embeddings.{}_embeddings.weight".format
    first_type = found[table("token_type")][0]
    weights = {
        "words.weight": found[table("word")],
        "positions.weight": found[table("position")][:length] + first_type,
    }
    for part in ("weight", "bias"):
        weights[f"after_words.{part}"] = found[f"embeddings.LayerNorm.{part}"]
        for at in range(shape.num_hidden_layers):
            of = f"encoder.layer.{at}."
            names = [f"{of}attention.self.{name}.{part}" for name in ("query", "key", "value")]
            weights[f"layers.{at}.attended.{part}"] = torch.cat([found[name] for name in names])
            for theirs, ours in _LAYER.items():
                weights[f"layers.{at}.{ours}.{part}"] = found[f"{of}{theirs}.{part}"]
    return weights


def _bad(folder: Path, what: str) -> ConfigError:
    hint = "give a folder with config.json and model.safetensors of a BERT encoder"
    return ConfigError("bad_checkpoint", f"{folder}: {what}", hint)
