"""A building block for texts: a transformer that reads token ids, from a Hugging Face folder.

Why: a pretrained encoder of texts is a folder with config.json and model.safetensors. What a family
needs of it is a module like any other: rows of token ids in, logits out; and a smaller one that
begins with what the larger one knows.

Invariants: rows are float32 ids (batch, length), padded at the end; an answer does not depend on
the padding, nor on the other rows. Trimming it saves time and changes nothing; an exported graph
holds none of it. Nothing is downloaded.

Knows nothing about tasks, losses, tokenizers or training. Reads `model_type = "bert"` (Devlin et
al. 2018). The one home of safetensors.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edge_runtime.errors import ConfigError
from edge_runtime.features.feature import Padding

_MASKED = -1e4  # after it a softmax gives exactly 0
_LAYER = {
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}


Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class Shape(msgspec.Struct, frozen=True):
    """What config.json says of an encoder; other keys are ignored."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    model_type: str = ""
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0


class Layer(nn.Module):
    """A transformer layer: self-attention and a feed-forward network, each with a residual."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        width, self.heads = shape.hidden_size, shape.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, shape.layer_norm_eps)
        self.intermediate = nn.Linear(width, shape.intermediate_size)
        self.output = nn.Linear(shape.intermediate_size, width)
        self.output_norm = nn.LayerNorm(width, shape.layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (batch, length, width); the mask (batch, 1, 1, length) joins the scores."""
        batch, length, width = states.shape
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(states).chunk(3, dim=2)
        )
        scores = query @ key.transpose(2, 3) * (width // self.heads) ** -0.5 + mask
        seen = (torch.softmax(scores, dim=3) @ value).transpose(1, 2).reshape(batch, length, width)
        states = self.attention_norm(states + self.dropout(self.attention_output(seen)))
        inner = self.output(nn.functional.gelu(self.intermediate(states)))
        found: Tensor = self.output_norm(states + self.dropout(inner))
        return found


class TextNetwork(nn.Module):
    """An encoder, the mean of its last states, and one linear layer over it: (batch, `outputs`)."""

    rates: ClassVar[dict[str, float]] = {"head": 20.0}
    """A head that knows nothing learns faster than an encoder that knows much."""

    def __init__(
        self, shape: Shape, outputs: int, *, embedding_width: int = 0, dropout: float = 0.1
    ) -> None:
        """With an `embedding_width` token embeddings are that narrow, and projected to the width of
        the hidden states (Lan et al. 2020).
        """
        super().__init__()
        width, self.pad = shape.hidden_size, shape.pad_token_id
        self.token_embedding = nn.Embedding(shape.vocab_size, embedding_width or width)
        self.projection = (
            nn.Linear(embedding_width, width, bias=False) if embedding_width else nn.Identity()
        )
        self.position_embedding = nn.Embedding(shape.max_position_embeddings, width)
        self.embedding_norm = nn.LayerNorm(width, shape.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, outputs)
        self.shape = shape

    @classmethod
    def from_folder(cls, folder: Path, outputs: int, padding: Padding) -> TextNetwork:
        """The encoder of a checkpoint with a new head, for texts that end as `padding` says.

        Raises: ConfigError `bad_checkpoint`.
        """
        shape = _shape(folder, padding)
        try:
            weights = _renamed(load_file(folder / "model.safetensors"), shape)
            network = cls(shape, outputs)
            network.load_state_dict({**network.state_dict(), **weights})
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise _bad(folder, f"model.safetensors does not fit config.json: {error}") from error
        return network

    def shortened(
        self, layers: list[int], embedding_width: int, intermediate_size: int
    ) -> TextNetwork:
        """A smaller network that starts from these layers, without dropout.

        Token embeddings are the truncated singular value decomposition of this one's. Of each
        feed-forward network those units stay whose weights are largest, the norm of what goes in
        times that of what comes out (Han et al. 2015 keep single weights so).
        """
        changed = {"num_hidden_layers": len(layers), "intermediate_size": intermediate_size}
        shape, outputs = msgspec.structs.replace(self.shape, **changed), self.head.out_features
        other = TextNetwork(shape, outputs, embedding_width=embedding_width, dropout=0.0)
        other.position_embedding = copy.deepcopy(self.position_embedding)
        other.embedding_norm = copy.deepcopy(self.embedding_norm)
        other.head = copy.deepcopy(self.head)
        for target, at in zip(other.layers, layers, strict=True):
            target.load_state_dict(_pruned(self.layers[at].state_dict(), intermediate_size))
        table = self.token_embedding.weight.detach()
        values, axes = torch.linalg.eigh(table.T @ table)
        axes = axes[:, values.argsort(descending=True)[:embedding_width]]
        other.token_embedding.load_state_dict({"weight": table @ axes})
        other.projection.load_state_dict({"weight": axes})
        return other

    def forward(self, features: Tensor) -> Tensor:
        """Logits of shape (batch, outputs)."""
        logits: Tensor = self.head(self.dropout(self.mean(features)))
        return logits

    def mean(self, features: Tensor) -> Tensor:
        """The mean of the last hidden states over the tokens, (batch, width)."""
        if not torch.compiler.is_exporting():
            features = features[:, : max(1, int(self.lengths(features).max()))]
        ids = features.long()
        is_token = (ids != self.pad).to(features.dtype)
        states = self.projection(self.token_embedding(ids))
        states = states + self.position_embedding.weight[: ids.shape[1]]
        states = self.dropout(self.embedding_norm(states))
        mask = (1 - is_token)[:, None, None, :] * _MASKED
        for layer in self.layers:
            states = layer(states, mask)
        count = is_token.sum(1, keepdim=True).clamp(min=1)
        mean: Tensor = (states * is_token[:, :, None]).sum(1) / count
        return mean

    def lengths(self, features: Tensor) -> Tensor:
        """Of each row, how many of its columns come before the padding, (batch,)."""
        places = torch.arange(1, features.shape[1] + 1)
        return ((features != self.pad) * places).amax(1)


def _pruned(layer: dict[str, Tensor], intermediate_size: int) -> dict[str, Tensor]:
    """A layer's tensors with so many units in its feed-forward network, the largest."""
    into, out = layer["intermediate.weight"], layer["output.weight"]
    largest = (into.norm(dim=1) * out.norm(dim=0)).topk(intermediate_size).indices.sort().values
    fewer = {"intermediate.weight": into[largest], "output.weight": out[:, largest]}
    return {**layer, **fewer, "intermediate.bias": layer["intermediate.bias"][largest]}


def _shape(folder: Path, padding: Padding) -> Shape:
    """What config.json says, of as many positions as are used."""
    try:
        shape = msgspec.json.decode((folder / "config.json").read_bytes(), type=Shape)
    except (OSError, msgspec.DecodeError) as error:
        raise _bad(folder, f"config.json: {error}") from error
    kind = shape.model_type, shape.hidden_act, shape.position_embedding_type
    if kind != ("bert", "gelu", "absolute"):
        raise _bad(folder, f"config.json: {kind} is not read, only ('bert', 'gelu', 'absolute')")
    if shape.hidden_size % shape.num_attention_heads:
        width, heads = shape.hidden_size, shape.num_attention_heads
        raise _bad(folder, f"config.json: {heads} heads do not divide a width of {width}")
    if shape.pad_token_id != padding.pad:
        own, given = shape.pad_token_id, padding.pad
        raise _bad(folder, f"config.json: padding has the id {own}, and {given} by the tokenizer")
    if shape.max_position_embeddings < padding.length:
        positions, length = shape.max_position_embeddings, padding.length
        raise _bad(folder, f"config.json: {positions} positions, for texts of {length} ids")
    return msgspec.structs.replace(shape, max_position_embeddings=padding.length)


def _renamed(found: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """A checkpoint's tensors as float32, by this module's names; query, key and value as one."""
    found = {name.removeprefix("bert."): tensor.float() for name, tensor in found.items()}
    table = "embeddings.{}_embeddings.weight".format
    first_type = found[table("token_type")][0]
    weights = {
        "token_embedding.weight": found[table("word")],
        "position_embedding.weight": found[table("position")][: shape.max_position_embeddings]
        + first_type,
    }
    for part in ("weight", "bias"):
        weights[f"embedding_norm.{part}"] = found[f"embeddings.LayerNorm.{part}"]
        for at in range(shape.num_hidden_layers):
            of = f"encoder.layer.{at}."
            names = [f"{of}attention.self.{name}.{part}" for name in ("query", "key", "value")]
            weights[f"layers.{at}.qkv.{part}"] = torch.cat([found[name] for name in names])
            for theirs, ours in _LAYER.items():
                weights[f"layers.{at}.{ours}.{part}"] = found[f"{of}{theirs}.{part}"]
    return weights


def _bad(folder: Path, what: str) -> ConfigError:
    hint = "give a folder with config.json and model.safetensors of a BERT encoder"
    return ConfigError("bad_checkpoint", f"{folder}: {what}", hint)
