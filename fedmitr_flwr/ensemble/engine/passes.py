"""Forward and backward pass of packed ViTs on a subset of their patches, written by hand.

- Only the gradient with respect to the pixels is computed; nothing is stored for weight gradients.
- Buffers are allocated once for each shape, because new memory costs page faults in every iteration.
- The last block computes only the rows that the head reads. Each such row is one query per head, so ``q W_k`` and the
  attention-weighted sum of tokens are computed before the projections; no token itself is multiplied by ``W_k`` or
  ``W_v``. The key bias adds the same value to all scores of a softmax and is omitted.

Letters: T teachers, B images, L patches, N tokens (prefix and patches), M = B N, D embedding, F hidden width of
the MLP, H heads, d = D / H, Q rows that the head reads, E pixels of a patch, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.ensemble.engine.kernels import Arena, add_linear, layer_norm, layer_norm_backward, linear, softmax
from fedmitr_flwr.ensemble.engine.packing import Pack, PackedBlock


@dataclass
class _Saved:
    """Activations that the backward pass of one block reads."""

    x: Tensor  # (T, M, D) input of the block
    norm1: tuple[Tensor, Tensor]  # mean and inverse standard deviation, (T, M, 1) each
    heads: Tensor  # (3, T B H, N, d) queries, keys, values
    weights: Tensor  # (T B H, N, N)
    middle: Tensor  # (T, M, D) after the attention's residual connection
    norm2: tuple[Tensor, Tensor]
    hidden: Tensor  # (T, M, F) before the activation


@dataclass
class _SavedLast:
    """Activations that the backward pass of the last block and of the head reads."""

    x: Tensor  # (T, M, D)
    norm1: tuple[Tensor, Tensor]
    normed: Tensor  # (T B, N, D)
    keys: Tensor  # (T B, H Q, D), q W_k
    weights: Tensor  # (T B, H Q, N)
    middle: Tensor  # (T, B Q, D)
    norm2: tuple[Tensor, Tensor]
    hidden: Tensor  # (T, B Q, F)
    rows: Tensor  # (T, B Q, D)
    norm: tuple[Tensor, Tensor]


@dataclass
class Pass:
    """Result of a forward pass.

    Attributes
    ----------
    logits
        ``(T, B, C)`` fp32.
    attention
        ``(T, B, L)`` attention of [CLS] to the patches in the last block, mean over the heads.
    features
        ``(T, B, D)`` fp32 [CLS] token after the last block, before the last norm.
    tokens
        N.
    saved, last
        Activations for `backward`; `saved` is empty without `keep`.
    """

    logits: Tensor
    attention: Tensor
    features: Tensor
    tokens: int
    saved: list[_Saved]
    last: _SavedLast


def forward(pack: Pack, patches: Tensor, index: Tensor | None, scratch: Arena, keep: Arena | None = None) -> Pass:
    """Run the forward pass of a pack on patches.

    Parameters
    ----------
    patches
        ``(B, L, E)`` fp32.
    index
        ``(B, L)`` int64 positions in the grid; None: all patches, in order.
    scratch
        Buffers whose content is not needed after the call.
    keep
        Buffers for the activations that `backward` reads; may be `scratch` itself. None: no backward pass follows, and
        all blocks share the buffers of the first.
    """
    T, (B, L, _) = pack.teachers, patches.shape
    store = scratch if keep is None else keep
    x = store.take("x", (T, B * (L + pack.prefix.shape[1]), _width(pack)), patches)
    _embed(pack, patches, index, x)
    saved = []
    for number, block in enumerate(pack.blocks[:-1]):
        x, parts = _block_forward(pack, block, x, B, scratch, store, "0" if keep is None else str(number))
        if keep is not None:
            saved.append(parts)
    last, logits = _last_forward(pack, x, B)
    attention = last.weights.view(T, B, pack.architecture.heads, pack.rows, -1)[:, :, :, 0].float().mean(2)
    features = last.rows.view(T, B, pack.rows, -1)[:, :, 0]
    return Pass(logits, attention[..., pack.prefix.shape[1] :], features, x.shape[1] // B, saved, last)


def backward(pack: Pack, done: Pass, gradient: Tensor, scratch: Arena, of_features: Tensor | None = None) -> Tensor:
    """Return the gradient of ``(gradient * logits).sum() + (of_features * features).sum()`` for the pixels.

    Parameters
    ----------
    done
        A forward pass that was run with `keep`.
    gradient
        ``(T, B, C)`` fp32 gradient with respect to the logits.
    of_features
        ``(T, B, D)`` fp32 gradient with respect to the features; None: 0.

    Returns
    -------
    Tensor
        ``(B, L, E)`` fp32, summed over the pack's teachers.
    """
    T, B, _ = gradient.shape
    g = _last_backward(pack, done.last, gradient, of_features)
    for block, saved in zip(reversed(pack.blocks[:-1]), reversed(done.saved), strict=True):
        g = _block_backward(pack, block, saved, g, B, scratch)
    D, prefix = g.shape[-1], pack.prefix.shape[1]
    tokens = g.view(T, B, done.tokens, D)[:, :, prefix:]
    flat = tokens.permute(1, 2, 0, 3).reshape(-1, T * D).to(pack.dtype)
    return (flat @ pack.embed.reshape(T * D, -1)).float().view(B, done.tokens - prefix, -1)


def activation_bytes(model: VisionTransformer, T: int, B: int, L: int, dtype: torch.dtype) -> int:
    """Return the size in bytes of what `forward` keeps for `backward`, for T teachers and without the last block."""
    N, D, block = L + model.num_prefix_tokens, model.embed_dim, cast(Block, model.blocks[0])
    heads, hidden = cast(Attention, block.attn).num_heads, cast(Mlp, block.mlp).fc1.out_features
    single = 8 * D + dtype.itemsize * (3 * D + cast(int, hidden) + heads * N)
    return T * B * N * single * (len(model.blocks) - 1)


def _width(pack: Pack) -> int:
    return pack.embed.shape[1]


def _embed(pack: Pack, patches: Tensor, index: Tensor | None, out: Tensor) -> None:
    """Write the ``(T, M, D)`` tokens, with position embedding, to `out`."""
    T, (B, L, E) = pack.teachers, patches.shape
    prefix, D = pack.prefix.shape[1], _width(pack)
    tokens = out.view(T, B, prefix + L, D)
    tokens[:, :, :prefix] = pack.prefix[:, None]
    flat = patches.reshape(B * L, E).to(pack.dtype)
    embedded = (flat @ pack.embed[0].mT)[None] if T == 1 else torch.bmm(flat.expand(T, -1, -1), pack.embed.mT)
    positions = pack.positions[:, None] if index is None else pack.positions[:, index]
    torch.add(embedded.view(T, B, L, D), positions, out=tokens[:, :, prefix:])


def _block_forward(
    pack: Pack, block: PackedBlock, x: Tensor, B: int, scratch: Arena, keep: Arena, place: str
) -> tuple[Tensor, _Saved]:
    T, M, D = x.shape
    H, N, dtype, eps = pack.architecture.heads, M // B, pack.dtype, pack.architecture.eps
    d, width = D // H, block.fc1.shape[1]
    normed, norm1 = layer_norm(x, eps, dtype)
    qkv = linear(normed, block.qkv_t, block.qkv_bias.to(dtype), scratch.take("qkv", (T, M, 3 * D), x, dtype))
    heads = keep.take("heads" + place, (3, T, B, H, N, d), x, dtype)
    heads.copy_(qkv.view(T, B, N, 3, H, d).permute(3, 0, 1, 4, 2, 5))
    heads = heads.view(3, T * B * H, N, d)
    scores = torch.bmm(heads[0], heads[1].mT, out=scratch.take("scores", (T * B * H, N, N), x, dtype))
    weights = keep.take("weights" + place, (T * B * H, N, N), x, dtype)
    softmax(scores, weights)
    mixed = torch.bmm(weights, heads[2], out=scratch.take("mixed", (T * B * H, N, d), x, dtype))
    mixed = scratch.take("merged", (T, B, N, H, d), x, dtype).copy_(mixed.view(T, B, H, N, d).transpose(2, 3))
    middle = keep.take("middle" + place, (T, M, D), x)
    add_linear(x, mixed.view(T, M, D), block.proj_t, block.proj_bias, middle, scratch)
    normed, norm2 = layer_norm(middle, eps, dtype)
    hidden = linear(normed, block.fc1_t, block.fc1_bias.to(dtype), keep.take("hidden" + place, (T, M, width), x, dtype))
    active = scratch.take("active", (T, M, width), x, dtype)
    torch.ops.aten.gelu.out(hidden, approximate=pack.architecture.approximate, out=active)
    out = add_linear(middle, active, block.fc2_t, block.fc2_bias, keep.take("x" + place, (T, M, D), x), scratch)
    return out, _Saved(x, norm1, heads, weights, middle, norm2, hidden)


def _block_backward(pack: Pack, block: PackedBlock, saved: _Saved, g: Tensor, B: int, scratch: Arena) -> Tensor:
    """Turn the ``(T, M, D)`` fp32 gradient of the block's output into that of its input, in place."""
    T, M, D = g.shape
    H, N, dtype = pack.architecture.heads, M // B, pack.dtype
    d, width = D // H, block.fc1.shape[1]
    active = linear(g.to(dtype), block.fc2, None, scratch.take("active", (T, M, width), g, dtype))
    torch.ops.aten.gelu_backward.grad_input(
        active, saved.hidden, approximate=pack.architecture.approximate, grad_input=active
    )
    normed = linear(active, block.fc1, None, scratch.take("normed", (T, M, D), g, dtype))
    g += layer_norm_backward(normed.float(), saved.middle, saved.norm2)
    merged = linear(g.to(dtype), block.proj, None, scratch.take("merged", (T, B, N, H, d), g, dtype).view(T, M, D))
    mixed = scratch.take("mixed", (T * B * H, N, d), g, dtype)
    mixed.view(T, B, H, N, d).copy_(merged.view(T, B, N, H, d).transpose(2, 3))
    queries, keys, values = saved.heads
    heads = scratch.take("heads gradient", (3, T * B * H, N, d), g, dtype)
    torch.bmm(saved.weights.mT, mixed, out=heads[2])
    scores = torch.bmm(mixed, values.mT, out=scratch.take("scores", (T * B * H, N, N), g, dtype))
    scores = torch.ops.aten._softmax_backward_data(scores, saved.weights, -1, dtype)
    torch.bmm(scores, keys, out=heads[0])
    torch.bmm(scores.mT, queries, out=heads[1])
    qkv = scratch.take("qkv", (T, M, 3 * D), g, dtype)
    qkv.view(T, B, N, 3, H, d).copy_(heads.view(3, T, B, H, N, d).permute(1, 2, 4, 0, 3, 5))
    linear(qkv, block.qkv, None, normed)
    g += layer_norm_backward(normed.float(), saved.x, saved.norm1)
    return g


def _last_forward(pack: Pack, x: Tensor, B: int) -> tuple[_SavedLast, Tensor]:
    block, (T, M, D) = pack.blocks[-1], x.shape
    H, N, Q, eps, dtype = pack.architecture.heads, M // B, pack.rows, pack.architecture.eps, pack.dtype
    d = D // H
    normed, norm1 = layer_norm(x, eps, dtype)
    normed = normed.view(T, B, N, D)
    w_q, w_k, w_v = block.qkv.view(T, 3, D, D).unbind(1)
    b_q, _, b_v = block.qkv_bias.to(dtype).view(T, 3, 1, D).unbind(1)
    q = torch.baddbmm(b_q, normed[:, :, :Q].reshape(T, B * Q, D), w_q.mT)
    keys = torch.matmul(q.view(T, B * Q, H, d).transpose(1, 2), w_k.view(T, H, d, D))  # (T, H, B Q, D)
    keys = keys.view(T, H, B, Q, D).permute(0, 2, 1, 3, 4).reshape(T * B, H * Q, D)
    normed = normed.view(T * B, N, D)
    weights = torch.bmm(keys, normed.mT).softmax(-1)
    mixed = torch.bmm(weights, normed).view(T, B, H, Q, D).transpose(1, 2).reshape(T, H, B * Q, D)
    mixed = torch.matmul(mixed, w_v.view(T, H, d, D).mT).transpose(1, 2).reshape(T, B * Q, D) + b_v
    rows = x.view(T, B, N, D)[:, :, :Q].reshape(T, B * Q, D)
    middle = rows + torch.bmm(mixed, block.proj.mT).float() + block.proj_bias
    after, norm2 = layer_norm(middle, eps, dtype)
    hidden = torch.baddbmm(block.fc1_bias.to(dtype), after, block.fc1.mT)
    active = F.gelu(hidden, approximate=pack.architecture.approximate)
    rows = middle + torch.bmm(active, block.fc2.mT).float() + block.fc2_bias
    final, norm = layer_norm(rows, eps, dtype)
    logits = torch.bmm(final.reshape(T, B, Q * D), pack.head.mT).float() + pack.head_bias
    return _SavedLast(x, norm1, normed, keys, weights, middle, norm2, hidden, rows, norm), logits


def _last_backward(pack: Pack, saved: _SavedLast, gradient: Tensor, of_features: Tensor | None) -> Tensor:
    """Return the ``(T, M, D)`` fp32 gradient of the last block's input, in a new tensor."""
    block, (T, B, _), dtype = pack.blocks[-1], gradient.shape, pack.dtype
    H, Q, D = pack.architecture.heads, pack.rows, _width(pack)
    d, N = D // H, saved.normed.shape[1]
    g = torch.bmm(gradient.to(dtype), pack.head).float().view(T, B * Q, D)
    g = layer_norm_backward(g, saved.rows, saved.norm)
    if of_features is not None:
        g.view(T, B, Q, D)[:, :, 0] += of_features
    active = torch.bmm(g.to(dtype), block.fc2)
    active = torch.ops.aten.gelu_backward(active, saved.hidden, approximate=pack.architecture.approximate)
    g = g + layer_norm_backward(torch.bmm(active, block.fc1).float(), saved.middle, saved.norm2)
    mixed = torch.bmm(g.to(dtype), block.proj).view(T, B * Q, H, d).transpose(1, 2)
    w_q, w_k, w_v = block.qkv.view(T, 3, D, D).unbind(1)
    mixed = torch.matmul(mixed, w_v.view(T, H, d, D))  # (T, H, B Q, D)
    mixed = mixed.view(T, H, B, Q, D).transpose(1, 2).reshape(T * B, H * Q, D)
    scores = torch.bmm(mixed, saved.normed.mT)
    scores = torch.ops.aten._softmax_backward_data(scores, saved.weights, -1, dtype)
    left, right = torch.cat([saved.weights, scores], 1), torch.cat([mixed, saved.keys], 1)
    normed = torch.bmm(left.mT, right).float().view(T, B, N, D)
    keys = torch.bmm(scores, saved.normed).view(T, B, H, Q, D).transpose(1, 2).reshape(T, H, B * Q, D)
    q = torch.matmul(keys, w_k.view(T, H, d, D).mT).transpose(1, 2).reshape(T, B * Q, D)
    normed[:, :, :Q] += torch.bmm(q, w_q).float().view(T, B, Q, D)
    out = layer_norm_backward(normed.view(T, B * N, D), saved.x, saved.norm1)
    out.view(T, B, N, D)[:, :, :Q] += g.view(T, B, Q, D)
    return out
