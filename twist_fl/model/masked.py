"""The masked variant: a whole model that acts as any subnet (paper, section 4.1; spec, section 7).

The input of each output projection is multiplied by a vector: zero for blocks that are not held, the scale for those
that are. Logits and gradients are the smaller model's, to rounding; without dropout, which draws other numbers for
another shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from twist_fl.blueprint.architectures import KINDS, Kind
from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint, Scale
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.model.subnet import ModelCache, attach_factors


def mask_vector(layout: Layout, blueprint: Blueprint, kind: Kind, layer: int, scale: Scale) -> torch.Tensor:
    """What the input of a layer's output projection is multiplied by: (blocks x width of a block), float64."""
    width = layout.by_name[layout.outputs[kind].format(layer=layer) + ".weight"].width
    blocks = torch.zeros(layout.num_blocks[KINDS.index(kind)], dtype=torch.float64)
    blocks[list(blueprint.held(kind, layer))] = blueprint.factor(kind, layer, scale)
    return blocks.repeat_interleave(width)


class MaskedModel:
    """The full model of a cache of its own, warm between rounds; each blueprint is another set of masks."""

    def __init__(self, models: ModelCache) -> None:
        self._models = models
        self._full = full_blueprint(models.layout)
        self._masks: dict[tuple[Kind, int], torch.Tensor] = {}

    def load(self, blueprint: Blueprint, state: Mapping[str, torch.Tensor], in_place: bool = False) -> PreTrainedModel:
        """The whole `state`, masked to the blueprint's subnet; `in_place` as in `ModelCache.load`.

        Blocks that are not held get zero gradients.
        """
        model = self._models.load(self._full, state, in_place)
        layout, like = self._models.layout, next(model.parameters())
        is_new = not self._masks
        for kind in KINDS:
            for layer in range(layout.num_layers):
                mask = mask_vector(layout, blueprint, kind, layer, self._models.scale)
                # The same tensor in every round: a compiled model knows it.
                self._masks.setdefault((kind, layer), torch.empty_like(mask, dtype=like.dtype, device=like.device))
                self._masks[kind, layer].copy_(mask)
        if is_new:
            attach_factors(model, layout, lambda kind, layer: self._masks[kind, layer])
        return model
