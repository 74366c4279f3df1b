"""Seeded initial weights with which a small ViT trains within a few hundred steps."""

from __future__ import annotations

import math
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.models.vit import grid_size

# Small, because the row of a class that a client never sees keeps these values and should not affect the ensemble.
HEAD_SCALE = 0.1


@torch.no_grad()
def seed_weights(model: VisionTransformer, seed: int) -> None:
    """Initialise all weights so that small ViTs train within a few hundred steps.

    With timm's standard deviation of 0.02 a ViT of embedding width 64 hardly trains. Here linear maps are normal with
    standard deviation 1/sqrt(fan-in). Maps that write to the residual stream (attn.proj, mlp.fc2) have half of that,
    and the classifier has a tenth. Patch positions are 2-D sines and cosines (MoCo v3, arXiv 2104.02057), tokens are
    normal with standard deviation 0.02, biases are zero, and norm weights and layer scales are one. The result depends
    only on `seed`; torch's global random state is not used.

    Raises
    ------
    ValueError
        If the model has a parameter that none of these rules covers.
    """
    draws = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name == "pos_embed":
            weight.copy_(_sincos_positions(model))
        elif name.endswith("_token"):
            weight.copy_(0.02 * torch.randn(weight.shape, generator=draws))
        elif name.endswith("bias"):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0)
        elif name.endswith("weight"):
            scale = 0.5 if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) else 1.0
            scale = HEAD_SCALE if name.startswith("head") else scale
            std = scale / math.sqrt(weight[0].numel())
            weight.copy_(std * torch.randn(weight.shape, generator=draws))
        else:
            raise ValueError(f"the parameter {name} of shape {tuple(weight.shape)} has no initialisation rule")


def _sincos_positions(model: VisionTransformer) -> Tensor:
    """Return (1, P or prefix + P, D): zeros for prefix tokens, a quarter of D for each sin/cos of row/column."""
    rows, columns = grid_size(model)
    D = model.embed_dim
    quarter = D // 4
    omega = 10000.0 ** (-torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (row, column)]
    out = torch.zeros(1, cast(Tensor, model.pos_embed).shape[1], D)
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    out[0, -rows * columns :, : 4 * quarter] = waves
    return out
