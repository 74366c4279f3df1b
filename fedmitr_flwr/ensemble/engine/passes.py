"""Forward and backward pass of packed ViTs on a subset of their patches, written by hand.

- Only the gradient with respect to the pixels is computed; nothing is stored for weight gradients.
- Buffers are allocated once for each shape, because new memory costs page faults in every iteration.
- The last block computes only the rows that the head reads. Each such row is one query per head, so ``q W_k`` and the
  attention-weighted sum of tokens are computed before the projections; no token itself is multiplied by ``W_k`` or
  ``W_v``. The key bias adds the same value to all scores of a softmax and is omitted.
- A pass has two parts. The trunk turns pixels into tokens, the tail turns tokens into logits. A trunk that T teachers
  share runs once (T = 1); its tokens are the input of the T tails.

Letters: T teachers, B images, L patches, N tokens (prefix and patches), M = B N, D embedding, F hidden width of
the MLP, H heads, d = D / H, Q rows that the head reads, E pixels of a patch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.ensemble.engine.kernels import Arena, add_linear, layer_norm, layer_norm_backward, linear, softmax
from fedmitr_flwr.ensemble.engine.packing import PackedBlock, Tail, Trunk

_Packed = Trunk | Tail


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
    """Activations that the backward pass of the last block reads."""

    x: Tensor  # (T, M, D)
    norm1: tuple[Tensor, Tensor]
    normed: Tensor  # (T B, N, D)
    keys: Tensor  # (T B, H Q, D), q W_k
    weights: Tensor  # (T B, H Q, N)
    middle: Tensor  # (T, B Q, D)
    norm2: tuple[Tensor, Tensor]
    hidden: Tensor  # (T, B Q, F)


@dataclass
class Tokens:
    """Result of a trunk, the input of tails.

    Attributes
    ----------
    x
        ``(T, B N, D)`` fp32 tokens. If the trunk includes the last block: ``(T, B Q, D)``, the rows that the head
        reads.
    images, tokens
        B and N.
    saved, last
        Activations for `trunk_backward`; `saved` is empty without `keep`, `last` is None without the last block.
    """

    x: Tensor
    images: int
    tokens: int
    saved: list[_Saved]
    last: _SavedLast | None


@dataclass
class Pass:
    """Result of a tail.

    Attributes
    ----------
    logits
        ``(T, B, C)`` fp32.
    attention
        ``(T, B, L)`` attention of [CLS] to the patches in the last block, mean over the heads.
    features
        ``(T, B, D)`` fp32 [CLS] token after the last block, before the last norm.
    rows, norm
        ``(T, B Q, D)`` fp32 rows that the head reads, and the statistics of the last norm, for `tail_backward`.
    saved, last
        Activations for `tail_backward`; `saved` is empty without `keep`, `last` is None if the trunk includes the last
        block.
    """

    logits: Tensor
    attention: Tensor
    features: Tensor
    rows: Tensor
    norm: tuple[Tensor, Tensor]
    saved: list[_Saved]
    last: _SavedLast | None


def trunk_forward(
    trunk: Trunk, patches: Tensor, index: Tensor | None, scratch: Arena, keep: Arena | None = None
) -> Tokens:
    """Run the patch embedding and the blocks of a trunk on patches.

    Parameters
    ----------
    patches
        ``(B, L, E)`` fp32.
    index
        ``(B, L)`` int64 positions in the grid; None: all patches, in order.
    scratch
        Buffers whose content is not needed after the call.
    keep
        Buffers for the activations that `trunk_backward` reads; may be `scratch` itself. None: no backward pass
        follows, and all blocks share the buffers of the first.
    """
    T, D, (B, L, _) = *trunk.embed.shape[:2], patches.shape
    store, N = scratch if keep is None else keep, trunk.prefix.shape[1] + L
    x = store.take("x", (T, B * N, D), patches)
    _embed(trunk, patches, index, x)
    whole = len(trunk.blocks) == trunk.architecture.blocks
    x, saved = _blocks_forward(trunk, trunk.blocks[:-1] if whole else trunk.blocks, x, B, scratch, keep)
    if not whole:
        return Tokens(x, B, N, saved, None)
    rows, last = _last_forward(trunk, trunk.blocks[-1], x, B)
    return Tokens(rows, B, N, saved, last)


def trunk_backward(trunk: Trunk, done: Tokens, g: Tensor, scratch: Arena) -> Tensor:
    """Return the gradient with respect to the pixels, ``(B, L, E)`` fp32, summed over the trunk's teachers.

    Parameters
    ----------
    done
        A forward pass that was run with `keep`.
    g
        Gradient with respect to `Tokens.x`, of the same shape. It is overwritten.
    """
    T, B, N, D = g.shape[0], done.images, done.tokens, g.shape[-1]
    blocks = trunk.blocks
    if done.last is not None:
        g, blocks = _last_backward(trunk, blocks[-1], done.last, g), blocks[:-1]
    g = _blocks_backward(trunk, blocks, done.saved, g, B, scratch)
    prefix = trunk.prefix.shape[1]
    tokens = g.view(T, B, N, D)[:, :, prefix:]
    flat = tokens.permute(1, 2, 0, 3).reshape(-1, T * D).to(trunk.dtype)
    return (flat @ trunk.embed.reshape(T * D, -1)).float().view(B, N - prefix, -1)


def tail_forward(tail: Tail, start: Tokens, scratch: Arena, keep: Arena | None = None) -> Pass:
    """Run the blocks of a tail, the last norm and the head.

    Parameters
    ----------
    start
        Result of the trunk of the same teachers, or of the trunk that all of them share. Its memory must not lie in
        `scratch` or `keep`, unless the trunk has no blocks.
    scratch, keep
        As for `trunk_forward`.
    """
    T, B = tail.teachers, start.images
    H, Q, prefix = tail.architecture.heads, tail.architecture.rows, tail.architecture.prefix
    x = start.x if start.x.shape[0] == T else start.x.expand(T, -1, -1)
    if start.last is None:
        x, saved = _blocks_forward(tail, tail.blocks[:-1], x, B, scratch, keep)
        rows, last = _last_forward(tail, tail.blocks[-1], x, B)
        weights = last.weights
    else:
        rows, last, saved, weights = x, None, [], start.last.weights
    final, norm = layer_norm(rows, tail.architecture.eps, tail.dtype)
    logits = torch.bmm(final.reshape(T, B, -1), tail.head.mT).float() + tail.head_bias
    attention = weights.view(-1, B, H, Q, start.tokens)[:, :, :, 0].float().mean(2)[..., prefix:].expand(T, -1, -1)
    features = rows.view(T, B, Q, -1)[:, :, 0]
    return Pass(logits, attention, features, rows, norm, saved, last)


def tail_backward(
    tail: Tail, done: Pass, gradient: Tensor, scratch: Arena, of_features: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return the gradient of ``(gradient * logits).sum() + (of_features * features).sum()`` for the tail's input.

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
        Gradient with respect to `Tokens.x` for each teacher, ``(T, B N, D)`` or ``(T, B Q, D)`` fp32.
    """
    T, B, _ = gradient.shape
    g = torch.bmm(gradient.to(tail.dtype), tail.head).float().view(done.rows.shape)
    g = layer_norm_backward(g, done.rows, done.norm)
    if of_features is not None:
        g.view(T, B, tail.architecture.rows, -1)[:, :, 0] += of_features
    if done.last is None:
        return g
    g = _last_backward(tail, tail.blocks[-1], done.last, g)
    return _blocks_backward(tail, tail.blocks[:-1], done.saved, g, B, scratch)


def activation_bytes(
    model: VisionTransformer, T: int, B: int, L: int, dtype: torch.dtype, blocks: int | None = None
) -> int:
    """Return the size in bytes of what the blocks keep for the backward pass, for T teachers.

    Parameters
    ----------
    blocks
        Number of blocks, without the last one of the model; None: all but the last one.
    """
    N, D, block = L + model.num_prefix_tokens, model.embed_dim, cast(Block, model.blocks[0])
    heads, hidden = cast(Attention, block.attn).num_heads, cast(Mlp, block.mlp).fc1.out_features
    single = 8 * D + dtype.itemsize * (3 * D + cast(int, hidden) + heads * N)
    return T * B * N * single * (len(model.blocks) - 1 if blocks is None else blocks)


def _embed(trunk: Trunk, patches: Tensor, index: Tensor | None, out: Tensor) -> None:
    """Write the ``(T, M, D)`` tokens, with position embedding, to `out`."""
    T, D, (B, L, E) = *trunk.embed.shape[:2], patches.shape
    prefix = trunk.prefix.shape[1]
    tokens = out.view(T, B, prefix + L, D)
    tokens[:, :, :prefix] = trunk.prefix[:, None]
    flat = patches.reshape(B * L, E).to(trunk.dtype)
    embedded = (flat @ trunk.embed[0].mT)[None] if T == 1 else torch.bmm(flat.expand(T, -1, -1), trunk.embed.mT)
    positions = trunk.positions[:, None] if index is None else trunk.positions[:, index]
    torch.add(embedded.view(T, B, L, D), positions, out=tokens[:, :, prefix:])


def _blocks_forward(
    pack: _Packed, blocks: Sequence[PackedBlock], x: Tensor, B: int, scratch: Arena, keep: Arena | None
) -> tuple[Tensor, list[_Saved]]:
    """Run blocks on ``(T, M, D)`` tokens; return the tokens and, with `keep`, the activations of each block."""
    saved = []
    for number, block in enumerate(blocks):
        store, place = (scratch, "0") if keep is None else (keep, str(number))
        x, parts = _block_forward(pack, block, x, B, scratch, store, place)
        if keep is not None:
            saved.append(parts)
    return x, saved


def _blocks_backward(
    pack: _Packed, blocks: Sequence[PackedBlock], saved: list[_Saved], g: Tensor, B: int, scratch: Arena
) -> Tensor:
    """Turn the ``(T, M, D)`` fp32 gradient of the blocks' output into that of their input, in place."""
    for block, parts in zip(reversed(blocks), reversed(saved), strict=True):
        g = _block_backward(pack, block, parts, g, B, scratch)
    return g


def _block_forward(
    pack: _Packed, block: PackedBlock, x: Tensor, B: int, scratch: Arena, keep: Arena, place: str
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


def _block_backward(pack: _Packed, block: PackedBlock, saved: _Saved, g: Tensor, B: int, scratch: Arena) -> Tensor:
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


def _last_forward(pack: _Packed, block: PackedBlock, x: Tensor, B: int) -> tuple[Tensor, _SavedLast]:
    """Return the ``(T, B Q, D)`` fp32 rows that the head reads, and the activations."""
    T, M, D = x.shape
    H, Q, eps, dtype = pack.architecture.heads, pack.architecture.rows, pack.architecture.eps, pack.dtype
    N, d = M // B, D // H
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
    return rows, _SavedLast(x, norm1, normed, keys, weights, middle, norm2, hidden)


def _last_backward(pack: _Packed, block: PackedBlock, saved: _SavedLast, g: Tensor) -> Tensor:
    """Turn the ``(T, B Q, D)`` fp32 gradient of the rows into that of the last block's input, ``(T, M, D)``."""
    T, _, D = g.shape
    H, Q, dtype = pack.architecture.heads, pack.architecture.rows, pack.dtype
    d, N, B = D // H, saved.normed.shape[1], g.shape[1] // Q
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
