"""Names of the weights in a checkpoint: prefixes of wrappers, and the names that other libraries give a ViT.

Training scripts store a model under a prefix ("module.", "state_dict.", "backbone.", "module.visual.trunk."), and
wrappers add a word to the names of the modules that they wrap. transformers and torchvision name the same weights
differently. `timm_names` brings all of these to timm's names. The weights themselves stay as they are, but for the
queries, keys and values of transformers, which timm holds in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Words that torch.compile, DistributedDataParallel, FSDP and activation checkpointing add to the names of modules.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class SeveralModelsError(ValueError):
    """The checkpoint holds more than one model; the message names their prefixes."""


@dataclass(frozen=True)
class _Layout:
    """How a library names the weights of a ViT.

    Attributes
    ----------
    library
        Name for the log.
    anchor
        Name of the weights that embed the patches; every model has them once.
    rules
        Pairs of a regular expression for a whole name and its replacement in timm, tried in this order.
    heads
        Names of classifiers that may stand beside the prefix of the model, and their names in timm.
    unused
        Regular expression for weights that a timm model does not have and does not need.
    """

    library: str
    anchor: str
    rules: Sequence[tuple[str, str]] = ()
    heads: Mapping[str, str] = field(default_factory=dict)
    unused: str = r"(?!)"


_TIMM = _Layout("timm", "patch_embed.proj.weight", heads={"head": "head", "head_dist": "head_dist"})
# ViT, DeiT, ViT-MAE, ViT-MSN and DINOv2 of transformers. Version 5 writes the names of version 4 to its own files, and
# other names appear in its state dict: layers, q_proj, o_proj, mlp.fc1.
_BLOCK = r"(?:encoder\.)?layers?\.(\d+)\."
_TRANSFORMERS = _Layout(
    "transformers",
    "embeddings.patch_embeddings.projection.weight",
    (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.distillation_token", "dist_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
        (_BLOCK + r"attention\.(?:attention\.query|q_proj)\.(\w+)", r"blocks.\1.attn.query.\2"),
        (_BLOCK + r"attention\.(?:attention\.key|k_proj)\.(\w+)", r"blocks.\1.attn.key.\2"),
        (_BLOCK + r"attention\.(?:attention\.value|v_proj)\.(\w+)", r"blocks.\1.attn.value.\2"),
        (_BLOCK + r"attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (_BLOCK + r"(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
        (_BLOCK + r"(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
        (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (_BLOCK + r"(?:output\.dense|mlp\.fc2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (_BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (r"layernorm\.(\w+)", r"norm.\1"),
    ),
    {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"},
    r"pooler\..*|embeddings\.mask_token",
)
_TORCHVISION = _Layout(
    "torchvision",
    "conv_proj.weight",
    (
        (r"class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (r"conv_proj\.(\w+)", r"patch_embed.proj.\1"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.ln\.(\w+)", r"norm.\1"),
    ),
    {"heads.head": "head"},
)
_LAYOUTS = (_TIMM, _TRANSFORMERS, _TORCHVISION)


def timm_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of a checkpoint under timm's names.

    Parameters
    ----------
    state
        Weights under the names of the file.

    Returns
    -------
    state
        Weights of the only ViT in the checkpoint. Its prefix is removed, whatever it is, and weights outside of the
        prefix are left out, except for the classifier. Names that belong to no known layout stay as they are.
    notes
        For the log: what was removed, converted and left out.

    Raises
    ------
    SeveralModelsError
        If several prefixes have a ViT, such as "student." and "teacher.".
    """
    plain = _without_wrappers(state)
    found = [(layout, prefix) for layout in _LAYOUTS for prefix in _prefixes(plain, layout.anchor)]
    if ("", _TIMM) in [(prefix, layout) for layout, prefix in found] or not found:
        return dict(plain), []
    if len(found) > 1:
        raise SeveralModelsError(", ".join(f"{prefix}*" for _, prefix in found))
    layout, prefix = found[0]
    named = {
        _translated(key.removeprefix(prefix), layout): value
        for key, value in plain.items()
        if key.startswith(prefix) and not re.fullmatch(layout.unused, key.removeprefix(prefix))
    }
    used = {key for key in plain if _translated(key.removeprefix(prefix), layout) in named and key.startswith(prefix)}
    for key, value in plain.items():
        name = None if key in used else _head_above(key, prefix, layout)
        if name is not None and name not in named:
            named[name] = value
            used.add(key)
    left_out = [key for key in plain if key not in used]
    notes = [f"the prefix {prefix} of its keys is removed"] if prefix else []
    notes += [f"the names of {layout.library} are converted to those of timm"] if layout is not _TIMM else []
    notes += [f"{len(left_out)} other weights are not used, such as {left_out[0]}"] if left_out else []
    return _fused(named), notes


def _without_wrappers(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Remove the words of wrappers from all names, unless two names would become the same."""
    plain = {_WRAPPERS.sub("", key): value for key, value in state.items()}
    return plain if len(plain) == len(state) else state


def _prefixes(state: Mapping[str, Tensor], anchor: str) -> list[str]:
    """Return what stands before the name `anchor`: empty, or parts that end with a point."""
    return [key.removesuffix(anchor) for key in state if key == anchor or key.endswith(f".{anchor}")]


def _head_above(key: str, prefix: str, layout: _Layout) -> str | None:
    """Return timm's name of a classifier that stands above the model's prefix, as "head" does beside "backbone.*"."""
    module, _, kind = key.rpartition(".")
    parts = prefix.split(".")[:-1]
    above = ["".join(f"{part}." for part in parts[:length]) for length in range(len(parts))]
    for place in reversed(above):
        name = layout.heads.get(module.removeprefix(place)) if module.startswith(place) else None
        if name is not None:
            return f"{name}.{kind}"
    return None


def _translated(name: str, layout: _Layout) -> str:
    module, _, kind = name.rpartition(".")
    if module in layout.heads:
        return f"{layout.heads[module]}.{kind}"
    for pattern, replacement in layout.rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join queries, keys and values of each block, ``(D, D)`` each, in timm's order to ``(3 D, D)``."""
    joined: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn)\.(query|key|value)\.(\w+)", key)
        names = [f"{match[1]}.{part}.{match[3]}" for part in ("query", "key", "value")] if match else []
        if match and all(name in state for name in names):
            joined[f"{match[1]}.qkv.{match[3]}"] = torch.cat([state[name] for name in names])
        else:
            joined[key] = value
    return joined
