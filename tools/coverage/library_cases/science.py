"""Proteins, time series, tables and texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from library_cases.case import Case, make_features, make_tokens


class Esm2(Case):
    """Protein language model of fair-esm: padding is found in the ids."""

    name = "ESM-2"
    library = "fair-esm"

    def build(self) -> nn.Module:
        from esm.model.esm2 import ESM2

        return ESM2(num_layers=2, embed_dim=32, attention_heads=2)

    def inputs(self, batch: int, length: int) -> dict[str, Any]:
        return {"tokens": make_tokens(batch, length, vocabulary=24)}


class EsmTransformers(Case):
    """The same in transformers, with a padding mask."""

    name = "ESM, transformers"
    library = "transformers"

    def build(self) -> nn.Module:
        from transformers import EsmConfig, EsmModel

        return EsmModel(
            EsmConfig(
                vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=32,
                num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                position_embedding_type="rotary",
            )
        )  # fmt: skip

    def inputs(self, batch: int, length: int) -> dict[str, Any]:
        mask = torch.ones(batch, length, dtype=torch.int64)
        if batch > 1:
            mask[-1, -length // 3 :] = 0
        return {"input_ids": make_tokens(batch, length, vocabulary=24), "attention_mask": mask}


class ModernBert(EsmTransformers):
    """Text encoder: two bases, for windows and for whole texts."""

    name = "ModernBERT"

    def build(self) -> nn.Module:
        from transformers import ModernBertConfig, ModernBertModel

        return ModernBertModel(
            ModernBertConfig(
                vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=2, max_position_embeddings=128, local_attention=8,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=3, sep_token_id=4,
            )
        )  # fmt: skip


class Chronos2(Case):
    """Time series: attention over time rotates, attention over series does not."""

    name = "Chronos-2, encoder"
    library = "chronos-forecasting"
    dims = {"inputs_embeds": {0: "batch", 1: "patches"}, "group_ids": {0: "batch"}}

    def build(self) -> nn.Module:
        from chronos.chronos2.config import Chronos2CoreConfig
        from chronos.chronos2.model import Chronos2Encoder

        config = Chronos2CoreConfig(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
        return Chronos2Encoder(config)

    def inputs(self, batch: int, patches: int) -> dict[str, Any]:
        return {
            "inputs_embeds": make_features(batch, patches, 32),
            "group_ids": torch.arange(batch),
        }


class TimesFm(Case):
    """Time series in patches, each with its own statistics."""

    name = "TimesFM 2.5"
    library = "transformers"
    sizes = ((2,), (3,), (1,))
    dims = {"past_values": {0: "batch"}, "past_values_padding": {0: "batch"}}

    def build(self) -> nn.Module:
        from transformers import TimesFm2_5Config, TimesFm2_5Model

        return TimesFm2_5Model(
            TimesFm2_5Config(
                patch_length=8, context_length=64, horizon_length=8, num_hidden_layers=2,
                hidden_size=32, intermediate_size=48, head_dim=16, num_attention_heads=2,
                num_key_value_heads=2, output_quantile_len=16, attn_implementation="sdpa",
            )
        )  # fmt: skip

    def inputs(self, batch: int) -> dict[str, Any]:
        return {
            "past_values": make_features(batch, 32),
            "past_values_padding": torch.zeros(batch, 32, dtype=torch.int64),
        }


class Toto(Case):
    """Time series: interleaved angles with a half-tiled scale of xPos."""

    name = "Toto, transformer"
    library = "toto-ts"
    sizes = ((2, 3, 6), (3, 2, 11), (1, 4, 20))
    dims = {
        "inputs": {0: "batch", 1: "variates", 2: "patches"},
        "id_mask": {0: "batch", 2: "patches"},
    }

    def build(self) -> nn.Module:
        from toto.model.transformer import Transformer

        return Transformer(
            num_layers=2, embed_dim=32, num_heads=2, mlp_hidden_dim=48, dropout=0.0,
            spacewise_every_n_layers=2, spacewise_first=False,
            use_memory_efficient_attention=False,
        )  # fmt: skip

    def inputs(self, batch: int, variates: int, patches: int) -> dict[str, Any]:
        return {
            "inputs": make_features(batch, variates, patches, 32),
            "id_mask": torch.zeros(batch, 1, patches),
        }


class TabIcl(Case):
    """Tables: attention over the columns of a row rotates."""

    name = "TabICL, row encoder"
    library = "tabicl"
    dims = {"src": {0: "rows", 1: "columns"}}

    def build(self) -> nn.Module:
        from tabicl._model.encoders import Encoder

        return Encoder(
            num_blocks=2, d_model=32, nhead=2, dim_feedforward=48, dropout=0.0, use_rope=True
        )

    def inputs(self, rows: int, columns: int) -> dict[str, Any]:
        return {"src": make_features(rows, columns, 32)}


CASES = (Esm2, EsmTransformers, ModernBert, Chronos2, TimesFm, Toto, TabIcl)
