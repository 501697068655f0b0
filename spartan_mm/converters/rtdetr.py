"""Official RT-DETR (PyTorch, v1) weights under this package's names.

Pure functions from state dict to state dict. The names that a model has follow from its
architecture, which is read from the tensors' names and shapes; whatever is missing or left over is
an error.
"""
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .common import ConversionError, StateDict, rename
from .spartan import convert_spartan_backbone

LINEAR = ('weight', 'bias')
NORM = ('weight', 'bias', 'running_mean', 'running_var')


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers stand where `pattern` has its group, counting from 0."""
    numbers = {int(match[1]) for match in map(re.compile(pattern).match, names) if match}
    return max(numbers, default=-1) + 1


def _entries(source: str, target: str, leaves: Iterable[str]) -> dict[str, str]:
    return {f'{target}.{leaf}': f'{source}.{leaf}' for leaf in leaves}


def _conv_norm(source: str, target: str) -> dict[str, str]:
    return {f'{target}.conv.weight': f'{source}.conv.weight',
            **_entries(f'{source}.norm', f'{target}.norm', NORM)}


def resnet_vd_names(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name -> the official one of every tensor in a ResNet-vd like the given one.

    Args:
        state_dict: PResNet's tensors, names without `backbone.`.

    Returns:
        Name -> name, without the BatchNorms' `num_batches_tracked`.
    """
    names = {}
    for index in range(3):
        source = f'conv1.conv1_{index + 1}'
        names[f'stem.{3 * index}.weight'] = f'{source}.conv.weight'
        names |= _entries(f'{source}.norm', f'stem.{3 * index + 1}', NORM)

    bottleneck = any('.branch2c.' in name for name in state_dict)
    for stage in range(4):
        for block in range(_count(state_dict, rf'res_layers\.{stage}\.blocks\.(\d+)\.')):
            source, target = f'res_layers.{stage}.blocks.{block}', f'layer{stage + 1}.{block}'
            for index, branch in enumerate('abc' if bottleneck else 'ab', start=1):
                names[f'{target}.conv{index}.weight'] = f'{source}.branch2{branch}.conv.weight'
                names |= _entries(f'{source}.branch2{branch}.norm', f'{target}.bn{index}', NORM)
            if block == 0:
                # Where the shortcut pools, the pooling is mmdet's element 0. Depths 50 and up have
                # it (with size 1) in the first stage as well.
                short = f'{source}.short' if stage == 0 else f'{source}.short.conv'
                first = 0 if stage == 0 and not bottleneck else 1
                names[f'{target}.downsample.{first}.weight'] = f'{short}.conv.weight'
                names |= _entries(f'{short}.norm', f'{target}.downsample.{first + 1}', NORM)
    return names


def encoder_names(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name -> the official one of every tensor in a hybrid encoder like the given one.

    Args:
        state_dict: The official model's tensors.

    Returns:
        Name -> name, without the BatchNorms' `num_batches_tracked`.
    """
    names = {}
    num_levels = _count(state_dict, r'encoder\.input_proj\.(\d+)\.')
    for level in range(num_levels):
        source, target = f'encoder.input_proj.{level}', f'neck.input_projs.{level}'
        names[f'{target}.conv.weight'] = f'{source}.0.weight'
        names |= _entries(f'{source}.1', f'{target}.norm', NORM)

    source, target = 'encoder.encoder.0.layers.0', 'neck.aifi'
    names |= _entries(f'{source}.self_attn', f'{target}.self_attn',
                      ('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias'))
    for part in ('linear1', 'linear2', 'norm1', 'norm2'):
        names |= _entries(f'{source}.{part}', f'{target}.{part}', LINEAR)

    for step in range(num_levels - 1):
        for part in ('lateral_convs', 'downsample_convs'):
            names |= _conv_norm(f'encoder.{part}.{step}', f'neck.{part}.{step}')
        for theirs, ours in (('fpn_blocks', 'top_down_blocks'), ('pan_blocks', 'bottom_up_blocks')):
            source, target = f'encoder.{theirs}.{step}', f'neck.{ours}.{step}'
            for part in ('conv1', 'conv2', 'conv3'):
                if part != 'conv3' or f'{source}.conv3.conv.weight' in state_dict:
                    names |= _conv_norm(f'{source}.{part}', f'{target}.{part}')
            bottlenecks = _count(state_dict, re.escape(source) + r'\.bottlenecks\.(\d+)\.')
            for block in range(bottlenecks):
                for part, branch in (('conv1', 'dense'), ('conv2', 'pointwise')):
                    names |= _conv_norm(f'{source}.bottlenecks.{block}.{part}',
                                        f'{target}.blocks.{block}.{branch}')
    return names


def decoder_names(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name -> the official one of every tensor in a decoder, with its heads, like the given
    one.

    Args:
        state_dict: The official model's tensors.

    Returns:
        Name -> name, without the BatchNorms' `num_batches_tracked`.
    """
    names = {'dn_query_generator.label_embedding.weight': 'decoder.denoising_class_embed.weight'}
    for level in range(_count(state_dict, r'decoder\.input_proj\.(\d+)\.')):
        names |= _conv_norm(f'decoder.input_proj.{level}', f'decoder.input_projs.{level}')
    for index in range(2):
        names |= _entries(f'decoder.query_pos_head.layers.{index}',
                          f'decoder.query_pos_head.{2 * index}', LINEAR)
    names |= _entries('decoder.enc_output.0', 'memory_trans_fc', LINEAR)
    names |= _entries('decoder.enc_output.1', 'memory_trans_norm', LINEAR)

    num_layers = _count(state_dict, r'decoder\.decoder\.layers\.(\d+)\.')
    for layer in range(num_layers):
        source, target = f'decoder.decoder.layers.{layer}', f'decoder.layers.{layer}'
        names |= _entries(f'{source}.self_attn', f'{target}.self_attn',
                          ('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias'))
        for part in ('cross_attn.sampling_offsets', 'cross_attn.attention_weights',
                     'cross_attn.value_proj', 'cross_attn.output_proj', 'linear1', 'linear2',
                     'norm1', 'norm2', 'norm3'):
            names |= _entries(f'{source}.{part}', f'{target}.{part}', LINEAR)

    heads = [(f'dec_score_head.{layer}', f'dec_bbox_head.{layer}') for layer in range(num_layers)]
    for index, (score, box) in enumerate([*heads, ('enc_score_head', 'enc_bbox_head')]):
        names |= _entries(f'decoder.{score}', f'bbox_head.cls_branches.{index}', LINEAR)
        for linear in range(3):
            names |= _entries(f'decoder.{box}.layers.{linear}',
                              f'bbox_head.reg_branches.{index}.{2 * linear}', LINEAR)
    return names


def _with_counters(state_dict: Mapping[str, Tensor], names: Mapping[str, str]) -> StateDict:
    """The tensors under their new names, with a counter for every BatchNorm."""
    names, counters = dict(names), {}
    for target, source in list(names.items()):
        if source.endswith('.running_var'):
            target, source = (name.replace('.running_var', '.num_batches_tracked')
                              for name in (target, source))
            # The official frozen BatchNorms have none; nothing reads it.
            if source in state_dict:
                names[target] = source
            else:
                counters[target] = torch.tensor(0)
    return rename(state_dict, names) | counters


def convert_resnet_vd(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Convert a backbone's official weights (PResNet, as published for pretraining) for ResNetVd.

    Args:
        state_dict: Tensors under their official names, without `backbone.`.

    Returns:
        The same tensors under this package's names.

    Raises:
        ConversionError: Keys are missing or left over; lists them.
    """
    return _with_counters(state_dict, resnet_vd_names(state_dict))


def convert_rtdetr(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, dict]:
    """Convert an official RT-DETR's weights for RTDETR, backbone ResNet-vd or SpaRTAN.

    Args:
        state_dict: Tensors under their official names.

    Returns:
        The same tensors under this package's names, and the settings of the `model` in a config
        that they fit.

    Raises:
        ConversionError: Keys are missing or left over, or the model is none of those above.
    """
    prefix = 'backbone.'
    rest = {name: tensor for name, tensor in state_dict.items() if not name.startswith(prefix)}
    if any(name.startswith(f'{prefix}net.') for name in state_dict):
        backbone, arch = convert_spartan_backbone(state_dict, f'{prefix}net.')
        settings = dict(type='SpaRTAN', arch=arch, out_indices=(1, 2, 3))
    else:
        backbone = convert_resnet_vd({name.removeprefix(prefix): tensor
                                      for name, tensor in state_dict.items() if name not in rest})
        settings = dict(type='ResNetVd', depth=_depth(backbone), out_indices=(1, 2, 3))

    converted = _with_counters(rest, encoder_names(rest) | decoder_names(rest))
    converted |= {f'{prefix}{name}': tensor for name, tensor in backbone.items()}
    return converted, dict(backbone=settings, **_settings(converted))


def _depth(backbone: Mapping[str, Tensor]) -> int:
    """The depth of a ResNet-vd under our names."""
    blocks = tuple(_count(backbone, rf'layer{stage}\.(\d+)\.') for stage in (1, 2, 3, 4))
    bottleneck = 'layer1.0.conv3.weight' in backbone
    depths = {((2, 2, 2, 2), False): 18, ((3, 4, 6, 3), False): 34,
              ((3, 4, 6, 3), True): 50, ((3, 4, 23, 3), True): 101}
    if (blocks, bottleneck) not in depths:
        raise ConversionError(f'no ResNet-vd 18, 34, 50 or 101: its stages have {blocks} '
                              f'{"bottleneck" if bottleneck else "basic"} blocks')
    return depths[blocks, bottleneck]


def _settings(converted: Mapping[str, Tensor]) -> dict:
    """What a config says of neck, decoder and head; our names."""
    num_levels = _count(converted, r'neck\.input_projs\.(\d+)\.')
    embed_dims, _ = converted['neck.aifi.linear2.weight'].shape
    hidden = len(converted['neck.top_down_blocks.0.conv1.conv.weight'])
    decoder_dims = len(converted['memory_trans_fc.weight'])
    return dict(
        neck=dict(
            in_channels=[converted[f'neck.input_projs.{level}.conv.weight'].shape[1]
                         for level in range(num_levels)],
            embed_dims=embed_dims, ffn_dims=len(converted['neck.aifi.linear1.weight']),
            expansion=hidden / embed_dims,
            num_blocks=_count(converted, r'neck\.top_down_blocks\.0\.blocks\.(\d+)\.')),
        decoder=dict(
            in_channels=[embed_dims] * num_levels, embed_dims=decoder_dims,
            num_layers=_count(converted, r'decoder\.layers\.(\d+)\.'),
            ffn_dims=len(converted['decoder.layers.0.linear1.weight'])),
        bbox_head=dict(num_classes=len(converted['bbox_head.cls_branches.0.bias']),
                       embed_dims=decoder_dims))
