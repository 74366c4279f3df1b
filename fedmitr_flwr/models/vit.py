"""Run a timm Vision Transformer on any subset of its patches.

Sparse model inversion (SMI, arXiv 2510.27186, section 4) excludes patches from the input, and FedMITR (arXiv
2605.10748) evaluates the high-density and the low-density patches of an image separately. Both need the model's exact
forward pass on a subset of the patches: the result equals that of the full model with the other tokens removed after
the position embedding. To save time, only the given patches are embedded, and the last block computes keys and values
for all tokens, but everything else only for the [CLS] token, because the head uses no other output.

The forward pass can be cut after any block. `forward_trunk` runs the part before the cut, `forward_tokens` the part
after it. Models that share their first blocks need the first part only once for all of them.

Dimension letters: B images, C classes, P patches of the full grid, L patches in the input, N tokens (prefix and
patches), E pixels of a patch (channels x height x width), D embedding, H heads, Q rows that the head reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_dropout import PatchDropout
from timm.layers.patch_embed import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from fedmitr_flwr.settings import SettingsError

_OTHER_ARCHITECTURES = {
    **dict.fromkeys(
        ("SwinTransformer", "SwinTransformerV2", "VisionTransformerSAM"),
        "its windowed attention needs the full grid of patches",
    ),
    **dict.fromkeys(
        ("Eva", "Beit", "VisionTransformerRelPos"),
        "attention with rotary or relative positions is not supported",
    ),
}


@dataclass(frozen=True)
class TokenOutput:
    """Outputs of a forward pass, all in the autograd graph.

    Attributes
    ----------
    logits
        (B, C) class logits.
    attention
        (B, L) attention of the [CLS] token to the patches in the last block, mean over heads. The values are those of
        the softmax: a row sums to one together with the attention to the prefix tokens. None if not requested.
    features
        (B, D) [CLS] token after the last block, before the last norm.
    """

    logits: Tensor
    attention: Tensor | None
    features: Tensor


@dataclass(frozen=True)
class TrunkOutput:
    """Output of the first blocks of a model, in the autograd graph.

    Attributes
    ----------
    tokens
        (B, N, D) all tokens. If the last block is included: (B, Q, D), only the rows that the head reads.
    attention
        (B, L) as in `TokenOutput`, if the last block is included and the attention is requested; else None.
    """

    tokens: Tensor
    attention: Tensor | None


def check_supported(model: nn.Module) -> None:
    """Raise an error for a model that cannot run on a subset of its patches.

    Raises
    ------
    SettingsError
        If the model has no [CLS] token, a head that pools patch tokens, windowed attention, an unsupported patch
        embedding, block, attention or MLP class, or similar. The message names ``model.name`` and the reason.
    """
    reason = _reason_against(model)
    if reason:
        config = getattr(model, "pretrained_cfg", None) or {}
        raise SettingsError(("model.name", config.get("architecture") or type(model).__name__, reason))


def _reason_against(model: nn.Module) -> str | None:
    kind = type(model).__name__
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        detail = _OTHER_ARCHITECTURES.get(kind, "this architecture is not supported")
        return f"must be a plain timm VisionTransformer, but is a {kind}: {detail}"
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        return f"must embed patches with one linear map, but has a hybrid or convolutional {type(embed).__name__}"
    if not model.has_class_token or model.cls_token is None:
        return "must have a [CLS] token"
    if model.attn_pool is not None or model.global_pool != "token":
        pool = model.global_pool or "no pooling"
        return (
            f'must classify from the [CLS] token (global_pool "token"), but its head uses the patch tokens ("{pool}")'
        )
    if any(side % patch for side, patch in zip(embed.img_size, embed.patch_size, strict=True)):
        return f"image size {embed.img_size} must be divisible by patch size {embed.patch_size}"
    if len(model.blocks) == 0:
        return "must have at least one transformer block"
    for block in model.blocks:
        if type(block) is not Block:
            return f"must have standard pre-norm blocks; {type(block).__name__} is not supported"
        if type(block.attn) is not Attention:
            return f"must have standard self-attention; {type(block.attn).__name__} is not supported"
        if type(block.mlp) not in (Mlp, GluMlp, SwiGLU):
            return f"must have an MLP that processes each token separately; {type(block.mlp).__name__} is not supported"
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) for module in model.modules()):
        return "must normalise each token separately; batch and group norm mix tokens"
    return None


_STEM = ("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.")


def in_trunk(name: str, depth: int) -> bool:
    """Return whether a parameter of this name belongs to the patch embedding, its tokens or the first `depth` blocks.

    These are the parameters that `forward_trunk` uses; all others belong to `forward_tokens`.
    """
    if name.startswith("blocks."):
        return int(name.split(".", 2)[1]) < depth
    return name.startswith(_STEM)


def patch_size(model: VisionTransformer) -> tuple[int, int]:
    """Return height and width of a patch in pixels."""
    height, width = model.patch_embed.patch_size
    return int(height), int(width)


def grid_size(model: VisionTransformer) -> tuple[int, int]:
    """Return rows and columns of the full grid of patches; P is their product."""
    rows, columns = model.patch_embed.grid_size
    return int(rows), int(columns)


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut images into patches, row by row; the exact inverse of `unpatchify`.

    Parameters
    ----------
    images
        (B, ch, H, W), any dtype.
    patch
        Height and width of a patch, divisors of H and W.

    Returns
    -------
    Tensor
        (B, P, E) with E = ch x height x width in the order of a flattened Conv2d weight.

    Raises
    ------
    ValueError
        If the height or width of the images is not a multiple of that of a patch.
    """
    B, channels, height, width = images.shape
    ph, pw = patch
    if height % ph or width % pw:
        raise ValueError(f"an image of {height} x {width} pixels cannot be cut into patches of {ph} x {pw}")
    cut = images.reshape(B, channels, height // ph, ph, width // pw, pw)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(B, (height // ph) * (width // pw), channels * ph * pw)


def unpatchify(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Join all patches of a grid to images; the exact inverse of `patchify`.

    Parameters
    ----------
    patches
        (B, P, E) in the order of `patchify`.
    patch, grid
        Height and width of a patch in pixels; rows and columns of the grid.

    Returns
    -------
    Tensor
        (B, ch, rows x height, columns x width).

    Raises
    ------
    ValueError
        If P or E does not fit the grid and the patch.
    """
    B, P, E = patches.shape
    (ph, pw), (rows, columns) = patch, grid
    if rows * columns != P or E % (ph * pw):
        raise ValueError(f"patches of shape {tuple(patches.shape)} do not fit a grid {grid} of patches {patch}")
    channels = E // (ph * pw)
    laid = patches.reshape(B, rows, columns, channels, ph, pw).permute(0, 3, 1, 4, 2, 5)
    return laid.reshape(B, channels, rows * ph, columns * pw)


def forward_images(
    model: VisionTransformer, images: Tensor, index: Tensor | None = None, *, attention: bool = False
) -> TokenOutput:
    """Run the model on all patches of images, or on those that `index` names.

    Parameters
    ----------
    model
        A model that `check_supported` accepts.
    images
        (B, ch, H, W) float, normalised, of the model's image size.
    index
        (B, L) int64, positions of the patches to use, counted row by row in the grid, in any order and without repeats
        in an image. None: all patches.
    attention
        Whether to return the [CLS] attention.

    Raises
    ------
    ValueError
        If the images do not have the model's image size.
    """
    patches = _all_patches(model, images)
    if index is not None:
        patches = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    return forward_patches(model, patches, index, attention=attention)


def leading_tokens(model: VisionTransformer, images: Tensor, blocks: int) -> Tensor:
    """Return the tokens of `forward_trunk` for all patches of images.

    Parameters
    ----------
    model, images
        As for `forward_images`.
    blocks
        Number of leading blocks to run, from 0 to the depth of the model.

    Raises
    ------
    ValueError
        If the images do not have the model's image size.
    """
    return forward_trunk(model, _all_patches(model, images), None, blocks).tokens


def _all_patches(model: VisionTransformer, images: Tensor) -> Tensor:
    patch, grid = patch_size(model), grid_size(model)
    if images.shape[-2:] != (patch[0] * grid[0], patch[1] * grid[1]):
        expected = f"{patch[0] * grid[0]} x {patch[1] * grid[1]}"
        raise ValueError(f"images of shape {tuple(images.shape)} do not fit: the model takes {expected} pixels")
    return patchify(images, patch)


def forward_patches(
    model: VisionTransformer, patches: Tensor, index: Tensor | None, *, attention: bool = False
) -> TokenOutput:
    """Run the model on patches; the result equals timm's forward pass with the other tokens removed.

    Dropout, patch dropout and drop path act as in timm in train mode. A distilled DeiT averages the logits of its two
    heads, as timm does in evaluation.

    Parameters
    ----------
    model
        A model that `check_supported` accepts.
    patches
        (B, L, E) float, normalised pixels in the order of `patchify`.
    index
        (B, L) int64, position of each patch in the grid, without repeats in an image. The values are not checked,
        because a check would wait for a GPU. None: all P patches in order.
    attention
        Whether to return the [CLS] attention.

    Raises
    ------
    ValueError
        If the shapes do not fit, or the attention is requested while patch dropout is active, because its columns
        would not correspond to `index`.
    """
    if attention and model.training and isinstance(model.patch_drop, PatchDropout):
        raise ValueError(
            "no [CLS] attention in train mode with patch_drop_rate > 0: its columns would not correspond to index"
        )
    tokens = forward_trunk(model, patches, index, 0).tokens
    return forward_tokens(model, tokens, 0, attention=attention)


def forward_trunk(
    model: VisionTransformer, patches: Tensor, index: Tensor | None, blocks: int, *, attention: bool = False
) -> TrunkOutput:
    """Run the embedding and the first blocks on patches; `forward_tokens` runs the rest of the model.

    Parameters
    ----------
    model, patches, index
        As for `forward_patches`.
    blocks
        Number of leading blocks to run, from 0 to the depth of the model.
    attention
        Whether to return the [CLS] attention if the last block is one of them.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    P = model.patch_embed.num_patches
    if (P if index is None else index.shape[1]) != patches.shape[1]:
        wanted = f"all {P} patches without an index" if index is None else f"index of shape {tuple(index.shape)}"
        raise ValueError(f"patches of shape {tuple(patches.shape)} do not fit: {wanted}")
    tokens = model.norm_pre(model.patch_drop(_embed(model, patches, index)))
    for block in model.blocks[: min(blocks, len(model.blocks) - 1)]:
        tokens = block(tokens)
    if blocks < len(model.blocks):
        return TrunkOutput(tokens, None)
    rows, weights = _last_block(cast(Block, model.blocks[-1]), tokens, read_tokens(model))
    return TrunkOutput(rows, _patch_attention(model, weights) if attention else None)


def forward_tokens(model: VisionTransformer, tokens: Tensor, blocks: int, *, attention: bool = False) -> TokenOutput:
    """Run the rest of the model on the tokens that its first blocks return.

    Parameters
    ----------
    model
        A model that `check_supported` accepts.
    tokens
        (B, N, D) result of `forward_trunk`; (B, Q, D) if all blocks have run.
    blocks
        Number of blocks that have run.
    attention
        Whether to return the [CLS] attention. It is not available if all blocks have run.
    """
    weights = None
    if blocks < len(model.blocks):
        for block in model.blocks[blocks:-1]:
            tokens = block(tokens)
        tokens, weights = _last_block(cast(Block, model.blocks[-1]), tokens, read_tokens(model))
    patch_weights = _patch_attention(model, weights) if attention and weights is not None else None
    logits = model.forward_head(model.norm(tokens))
    return TokenOutput(logits=logits, attention=patch_weights, features=tokens[:, 0])


def read_tokens(model: VisionTransformer) -> int:
    """Return Q, the number of tokens that the heads read."""
    return 2 if isinstance(model, VisionTransformerDistilled) else 1


def _patch_attention(model: VisionTransformer, weights: Tensor) -> Tensor:
    """Return the (B, L) attention of [CLS] to the patches, given the (B, H, Q, N) attention of the last block."""
    return weights[:, :, 0, model.num_prefix_tokens :].mean(dim=1)


def head_input(model: VisionTransformer, features: Tensor) -> Tensor:
    """Return what the classifier head multiplies with its weights: the normalised [CLS] token.

    Parameters
    ----------
    model
        A model with one head, in evaluation mode.
    features
        (B, D) [CLS] tokens before the last norm, as in `TokenOutput.features`.

    Returns
    -------
    Tensor
        (B, D) tokens after ``norm`` and ``fc_norm``, whichever the model has. The logits are ``model.head`` of them.
    """
    rows: Tensor = model.forward_head(model.norm(features[:, None]), pre_logits=True)
    return rows


def _embed(model: VisionTransformer, patches: Tensor, index: Tensor | None) -> Tensor:
    """Embed (B, L, E) patches as (B, N, D) tokens with position embedding, prefix tokens first."""
    conv = model.patch_embed.proj
    x: Tensor = model.patch_embed.norm(F.linear(patches, conv.weight.flatten(1), conv.bias))
    second = model.dist_token if isinstance(model, VisionTransformerDistilled) else model.reg_token
    prefix = cast(Tensor, model.cls_token)
    prefix = prefix if second is None else torch.cat((prefix, second), dim=1)
    positions: Tensor | None = model.pos_embed
    if positions is None:  # timm does not apply pos_drop in this case either
        return torch.cat((prefix.expand(len(x), -1, -1), x), dim=1)
    if not model.no_embed_class:
        count = model.num_prefix_tokens
        prefix, positions = prefix + positions[:, :count], positions[:, count:]
    x = x + (positions if index is None else F.embedding(index, positions[0]))
    tokens: Tensor = model.pos_drop(torch.cat((prefix.expand(len(x), -1, -1), x), dim=1))
    return tokens


def _last_block(block: Block, tokens: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Return the first `queries` outputs of a block, (B, queries, D), and their attention, (B, H, queries, N).

    The attention is computed explicitly, because its weights are the density score. One or two rows cost little.
    """
    attn = cast(Attention, block.attn)
    B, N, _ = tokens.shape
    H, width = attn.num_heads, attn.proj.in_features
    normed = block.norm1(tokens)
    if isinstance(attn.qkv, nn.Linear):
        weight, bias = attn.qkv.weight, attn.qkv.bias
        q = F.linear(normed[:, :queries], weight[:width], None if bias is None else bias[:width])
        kv = F.linear(normed, weight[width:], None if bias is None else bias[width:])
    else:  # with a LoRA adapter the matrix cannot be cut without leaving the adapter out
        qkv = attn.qkv(normed)
        q, kv = qkv[:, :queries, :width], qkv[..., width:]
    q = attn.q_norm(q.reshape(B, queries, H, -1).transpose(1, 2))
    k, v = kv.reshape(B, N, 2, H, -1).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((q * attn.scale) @ attn.k_norm(k).transpose(-2, -1)).softmax(dim=-1)
    mixed = (attn.attn_drop(weights) @ v).transpose(1, 2).reshape(B, queries, width)
    mixed = attn.norm(mixed)
    gate = getattr(attn, "gate", None)
    if gate is not None:
        mixed = mixed * gate(normed[:, :queries]).sigmoid()
    rows = tokens[:, :queries]
    rows = rows + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(mixed))))
    return rows + block.drop_path2(block.ls2(block.mlp(block.norm2(rows)))), weights
