"""The forms for inference: modules that compute the same with fewer operations.

Each function changes its module in place and is the method `switch_to_deploy` of its class. The
weights are other ones afterwards, and what only training needs is gone.
"""
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> None:
    """Fold each BatchNorm into the convolution that stands right before it.

    A folded norm becomes an identity, so whatever calls it works on. Doing it again changes
    nothing.

    NOTE: mmcv's ``fuse_conv_bn`` does the same and more: it also folds where another layer stands
    between the two, and norms which are more than that, such as timm's with an activation inside.

    Args:
        module: Changed in place, all that is in it included.
    """
    names = list(module._modules)
    for name, following in zip_longest(names, names[1:]):
        conv, norm = module._modules[name], module._modules.get(following)
        if (type(conv) is nn.Conv2d and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
                and conv.out_channels == norm.num_features and norm.track_running_stats):
            module._modules[name] = fuse_conv_bn_eval(conv.eval(), norm.eval())
            module._modules[following] = nn.Identity()
        elif conv is not None:
            fold_batch_norms(conv)


def done_once(switch: Callable[..., None]) -> Callable[..., None]:
    """Let doing it again change nothing, by the attribute `deploy` of the module."""
    @wraps(switch)
    def switch_once(module: nn.Module, *args) -> None:
        if not module.deploy:
            with torch.no_grad():
                switch(module, *args)
            module.deploy = True

    return switch_once


@done_once
def fuse_branches(block: nn.Module) -> None:
    """Replace both branches of a RepVGGBlock by the one convolution that equals them."""
    fold_batch_norms(block)
    block.fused = block.dense.conv
    block.fused.weight += F.pad(block.pointwise.conv.weight, [1] * 4)
    block.fused.bias += block.pointwise.conv.bias
    del block.dense, block.pointwise


@done_once
def fuse_paths(layer: nn.Module, projection: nn.Conv2d | None = None) -> None:
    """Fuse the blocks of a CSPRepLayer and join both paths, one convolution a map.

    Args:
        layer: Changed in place.
        projection: A 1x1 convolution before the layer's own map, to be folded in.
    """
    for block in layer.blocks:
        fuse_branches(block)
    fold_batch_norms(layer)
    split_maps(layer, *joined([layer.conv1.conv, layer.conv2.conv]), projection)
    del layer.conv1, layer.conv2


@done_once
def fuse_csp(path: nn.Module) -> None:
    """Fuse the blocks of a CSPPath and join both its paths."""
    for block in path.blocks:
        fuse_branches(block)
    fold_batch_norms(path)
    path.both = pointwise_conv(*joined([path.conv1.conv, path.conv2.conv]))
    del path.conv1, path.conv2


@done_once
def fuse_elan(block: nn.Module, projection: nn.Conv2d | None = None) -> None:
    """Fuse what an ELANBlock is made of; see :func:`fuse_paths`."""
    for path, _ in block.stages:
        fuse_csp(path)
    fold_batch_norms(block)
    split_maps(block, block.conv1.conv.weight, block.conv1.conv.bias, projection)
    del block.conv1


def split_maps(layer: nn.Module, weight: Tensor, bias: Tensor,
               projection: nn.Conv2d | None) -> None:
    """Give a layer the convolutions `other` and `own` for a 1x1 one of two concatenated maps.

    Args:
        layer: Changed in place.
        weight: (C', 2 C, 1, 1).
        bias: (C',).
        projection: A 1x1 convolution before the second map, to be folded in.
    """
    other, own = weight.chunk(2, 1)
    if projection is not None:
        bias = bias + own.flatten(1) @ projection.bias
        own = (own.flatten(1) @ projection.weight.flatten(1))[..., None, None]
    layer.other = pointwise_conv(other)
    layer.own = pointwise_conv(own, bias)


@done_once
def fuse_encoder(neck: nn.Module) -> None:
    """Fold every BatchNorm of a HybridEncoder, fuse its blocks and join what is linear."""
    fold_batch_norms(neck.input_projs)
    for step, block in enumerate(neck.top_down_blocks):
        # The projection of a finer map has no other use. Folding saves work but for maps with
        # several times the neck's channels.
        level = len(neck.input_projs) - 2 - step
        projection = neck.input_projs[level].conv
        given, projected = projection.in_channels, projection.out_channels
        paths = sum(block.paths)
        if given * paths <= projected * (given + paths):
            block.switch_to_deploy(projection)
            neck.input_projs[level] = nn.Identity()
        else:
            block.switch_to_deploy()
    for block in neck.bottom_up_blocks:
        block.switch_to_deploy()
    fold_batch_norms(neck)


@done_once
def join_query_projections(attention: nn.Module) -> None:
    """Join the two projections that MultiScaleDeformableAttention makes of its queries."""
    parts = attention.sampling_offsets, attention.attention_weights
    weight, bias = joined(parts)
    attention.sampling_split = [part.out_features for part in parts]
    attention.sampling = nn.Linear(*weight.T.shape).to(weight)
    attention.sampling.weight.copy_(weight)
    attention.sampling.bias.copy_(bias)
    del attention.sampling_offsets, attention.attention_weights


@done_once
def trim_decoder(decoder: nn.Module) -> None:
    """Drop the layers after `eval_idx` of an RTDETRDecoder, fold norms and join projections."""
    decoder.num_layers = decoder.eval_idx + 1
    decoder.layers = decoder.layers[:decoder.num_layers]
    fold_batch_norms(decoder.input_projs)
    for layer in decoder.layers:
        join_query_projections(layer.cross_attn)


@done_once
def trim_head(head: nn.Module, eval_idx: int) -> None:
    """Drop the branches of a head that no prediction comes from; others keep their names.

    Args:
        head: Changed in place.
        eval_idx: The decoder layer whose output is the prediction.
    """
    layers = len(head.reg_branches) - 1  # of the decoder; the last branch is the encoder's
    for name in ('reg_branches', *head.final_branches):
        del getattr(head, name)[eval_idx + 1:layers]
    # Boxes are refined in every layer, classes are read from the last alone.
    for name in head.final_branches:
        for layer in range(eval_idx):
            getattr(head, name)[layer] = nn.Identity()


def joined(layers: Sequence[nn.Conv2d | nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer that gives the outputs of all, one after the other."""
    return torch.cat([layer.weight for layer in layers]), torch.cat([
        layer.bias for layer in layers])


def pointwise_conv(weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    """The 1x1 convolution of this weight (C', C, 1, 1) and bias (C',)."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None).to(weight)
    conv.weight.copy_(weight)
    if bias is not None:
        conv.bias.copy_(bias)
    return conv
