"""Parameters and multiply-adds of models."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..zoo import without_pretrained

aten = torch.ops.aten

# What fvcore counts for each element that goes into an operation, besides convolutions and products
# of matrices.
OPERATIONS_PER_ELEMENT = {
    aten.native_group_norm: 5,
    aten.native_layer_norm: 5,
    aten.native_batch_norm: 2,
    aten._native_batch_norm_legit_no_training: 2,  # the same in newer versions of PyTorch
    aten.mean: 1,  # global pools
}


@dataclass(frozen=True)
class Complexity:
    """The size of a model.

    Args:
        parameters: Number of parameters.
        multiply_adds: Multiplications (each with an addition) of the convolutions, linear layers
            and attentions for one image, as the code computes them: half of what PyTorch's flop
            counter says.
        operations: The same with norms and global pools, as fvcore counts.
    """

    parameters: int
    multiply_adds: int
    operations: int


def measure_complexity(model: nn.Module, height: int, width: int) -> Complexity:
    """Count parameters and multiply-adds in a pass over one image.

    Args:
        model: Takes images, (N, 3, H, W). It is left in evaluation mode. On the meta device nothing
            is computed.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
    """
    image = next(model.parameters()).new_zeros(1, 3, height, width)
    per_element = {op: _per_element(count) for op, count in OPERATIONS_PER_ELEMENT.items()}
    # The counter knows these only where they are not in place.
    in_place = {aten.addmm_: _product, aten.baddbmm_: _product}
    counter = FlopCounterMode(display=False, custom_mapping=per_element | in_place)
    # Nor does it know the attention that PyTorch would choose on a CPU.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(image)
    counts = counter.get_flop_counts()['Global']
    operations = counter.get_total_flops() // 2
    return Complexity(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=operations - sum(counts.get(op, 0) for op in per_element) // 2,
        operations=operations)


def build_without_weights(config: Config) -> nn.Module:
    """Build the model of a config on the meta device: shapes, and no numbers.

    Args:
        config: One whose ``custom_imports`` have been made.
    """
    with DefaultScope.overwrite_default_scope(config.default_scope), torch.device('meta'):
        model = MODELS.build(without_pretrained(config.model))
    # PyTorch's flop counter stumbles over views of parameters with gradients.
    return model.requires_grad_(False)


def _per_element(count: int):
    # The flop counter counts a multiply-add twice.
    def formula(shape: Iterable[int], *args: Any, **kwargs: Any) -> int:
        return 2 * count * prod(getattr(shape, 'shape', shape))
    return formula


def _product(total: Sequence[int], left: Sequence[int], right: Sequence[int], *args: Any,
             **kwargs: Any) -> int:
    return 2 * prod(left) * right[-1]
