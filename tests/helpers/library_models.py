"""Small models that use the rotary embeddings of other libraries."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings

import torch
from torch import nn


def import_alone(name):
    """Import one module of a package whose own import needs packages that torch 2.13 has outgrown.

    (torchtune 0.6: torchao; zetascale 2.8: transformers 4, bitsandbytes and more.) The module
    itself needs torch and einops alone.
    """
    if name in sys.modules:
        return sys.modules[name]
    package = name.partition(".")[0]
    stubbed = sys.modules.get(package)
    found = (
        stubbed.__path__
        if stubbed
        else importlib.util.find_spec(package).submodule_search_locations
    )
    folder = found[0]
    parts = name.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        stub = types.ModuleType(".".join(parts[:depth]))
        stub.__path__ = ["/".join([folder, *parts[1:depth]])]
        sys.modules.setdefault(stub.__name__, stub)
    return importlib.import_module(name)


def make_x_transformers(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from x_transformers import Decoder, TransformerWrapper

        torch.manual_seed(0)
        layers = Decoder(dim=64, depth=2, heads=4, **options)
        model = TransformerWrapper(
            num_tokens=96, max_seq_len=256, use_abs_pos_emb=False, attn_layers=layers
        )
    return model.eval(), {"x": torch.arange(12).reshape(2, 6) % 96}


class Attention(nn.Module):
    """Causal attention whose queries and keys `rotate` turns."""

    def __init__(self, rotate, seq_first=False):
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.rotate = rotate
        self.seq_first = seq_first

    def forward(self, x):
        batch, rows, _ = x.shape
        heads = self.qkv(x).view(batch, rows, 3, 4, 16)
        query, key, value = heads.unbind(2)  # (B, S, N, H)
        if not self.seq_first:
            query, key = self.rotate(query.transpose(1, 2), key.transpose(1, 2))
        else:
            query, key = (t.transpose(1, 2) for t in self.rotate(query, key))
        out = nn.functional.scaled_dot_product_attention(
            query, key, value.transpose(1, 2), is_causal=True
        )
        return x + out.transpose(1, 2).flatten(2)


class Stack(nn.Module):
    def __init__(self, *layers, rope=None):
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.rope = rope
        self.layers = nn.ModuleList(layers)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def make_rotary_embedding_torch(use_xpos=False, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rotary_embedding_torch import RotaryEmbedding

    torch.manual_seed(0)
    rope = RotaryEmbedding(dim=8, use_xpos=use_xpos, **options)

    def rotate(query, key):
        if use_xpos:
            return rope.rotate_queries_and_keys(query, key)
        return rope.rotate_queries_or_keys(query), rope.rotate_queries_or_keys(key)

    model = Stack(Attention(rotate), Attention(rotate), rope=rope)
    return model.eval(), {"ids": torch.arange(12).reshape(2, 6)}


def make_torchtune():
    module = import_alone("torchtune.modules.position_embeddings")
    torch.manual_seed(0)
    rope = module.RotaryPositionalEmbeddings(dim=16, max_seq_len=256)

    def rotate(query, key):
        return rope(query), rope(key)

    model = Stack(Attention(rotate, True), Attention(rotate, True), rope=rope)
    return model.eval(), {"ids": torch.arange(12).reshape(2, 6)}


def make_zeta(**options):
    zeta = import_alone("zeta.structs.transformer")
    torch.manual_seed(0)
    layers = zeta.Decoder(dim=64, depth=2, heads=4, **options)
    model = zeta.Transformer(
        num_tokens=96, max_seq_len=256, use_abs_pos_emb=False, attn_layers=layers
    )
    return model.eval(), {"x": torch.arange(12).reshape(2, 6) % 96}
