"""The authors' SpaRTAN checkpoints in this package's names."""
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..backbones import SpaRTAN
from .common import ConversionError, StateDict, check_shapes, rename

# What the parts of a block are called here and there, where the two differ.
_BLOCK_NAMES = (
    ('norm1.', 'norm_1.'),
    ('norm2.', 'norm_2.'),
    ('layer_scale1', 'scale_1'),
    ('layer_scale2', 'scale_2'),
    ('smixer.high_freq.', 'smixer.h_conv.'),
    ('smixer.high_se.', 'smixer.h_attn.'),
    ('smixer.low_freq.0.', 'smixer.l_conv.0.conv.'),
    ('smixer.low_freq.1.', 'smixer.l_conv.1.'),
    ('smixer.low_se.', 'smixer.l_attn.'),
    ('cmixer.complex_weight', 'cmixer.complex'),
    ('cmixer.refine.', 'cmixer.conv.'),
    ('cmixer.se.', 'cmixer.attn.'),
)


def convert_spartan(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, dict]:
    """Convert a classifier of the authors into an ``ImageClassifier`` of mmpretrain.

    Args:
        state_dict: The released model's weights, all of them and nothing else.

    Returns:
        The weights, under ``backbone.`` and ``head.fc.`` (a ``LinearClsHead``; its pooling neck
        has none), and the backbone's `arch`.

    Raises:
        ConversionError: If keys are missing or left over, or shapes do not fit together.
    """
    head_names = {'head.fc.weight': 'linear.weight', 'head.fc.bias': 'linear.bias'}
    head = {name: value for name, value in state_dict.items() if name in head_names.values()}
    backbone = {name: value for name, value in state_dict.items() if name not in head}

    backbone, arch = convert_spartan_backbone(backbone)
    head = rename(head, head_names)
    converted = {f'backbone.{name}': value for name, value in backbone.items()} | head
    num_classes = converted['head.fc.bias'].numel()
    check_shapes(converted, {'head.fc.weight': (num_classes, arch['channels'][-1]),
                             'head.fc.bias': (num_classes, )})
    return converted, arch


def convert_spartan_backbone(state_dict: Mapping[str, Tensor],
                             prefix: str = '') -> tuple[StateDict, dict]:
    """Convert a backbone of the authors, alone or inside a larger model.

    Args:
        state_dict: Weights. Names that do not begin with `prefix` are not looked at.
        prefix: What stands before the backbone's names, as 'backbone.net.' in a detector. It is
            taken off.

    Returns:
        The weights as ``SpaRTAN`` names them, and its `arch`.

    Raises:
        ConversionError: If keys are missing or left over, or shapes do not fit together.
    """
    state_dict = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
    arch, layers = _read_arch(state_dict, prefix)

    in_channels = _shape(state_dict, f'{prefix}conv.0.conv.weight')[1]
    with torch.device('meta'):
        try:
            expected = SpaRTAN(arch, in_channels).state_dict()
        except ValueError as error:
            raise ConversionError(f'the shapes are not those of a SpaRTAN: {error}') from error

    converted = rename(state_dict, {
        name: [prefix + source for source in _official_names(name, layers)] for name in expected})
    for name, value in converted.items():
        if name.endswith('.complex_weight'):
            # The released (1, 1, 1, pairs, 2) holds the same numbers in the same order.
            converted[name] = value.flatten(0, -2)
    check_shapes(converted, {name: value.shape for name, value in expected.items()})
    return converted, arch


def _read_arch(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[dict, list[list[int]]]:
    """The architecture, and for each stage the numbers of its layers.

    The authors number all layers in one running list. Each stage has its blocks there, and before
    these, except in the first stage, its embedding.
    """
    numbers, blocks = set(), set()
    for name in state_dict:
        match = re.match(re.escape(prefix) + r'layers\.(\d+)\.(smixer|cmixer)?', name)
        if match:
            numbers.add(int(match[1]))
            if match[2]:
                blocks.add(int(match[1]))

    gaps = set(range(max(numbers, default=0) + 1)) - numbers
    if gaps:
        missing = '\n  '.join(f'{prefix}layers.{number}.*' for number in sorted(gaps))
        raise ConversionError(f'not a whole SpaRTAN checkpoint; missing keys:\n  {missing}')

    layers, channels = [[]], [_shape(state_dict, f'{prefix}conv.1.conv.weight')[0]]
    for number in sorted(numbers):
        if number not in blocks:
            layers.append([])
            channels.append(_shape(state_dict, f'{prefix}layers.{number}.conv.weight')[0])
        layers[-1].append(number)

    arch = dict(stem_channels=_shape(state_dict, f'{prefix}conv.0.conv.weight')[0], depths=(),
                channels=tuple(channels), expand_ratios=(), conv_types=())
    for stage, members in enumerate(layers):
        depth = len(members) - (stage > 0)
        if depth < 1:
            raise ConversionError(f'not a whole SpaRTAN checkpoint: stage {stage + 1} has no block')
        block = f'{prefix}layers.{members[-1]}'
        hidden = _shape(state_dict, f'{block}.cmixer.proj_out.weight')[1]
        depthwise = _shape(state_dict, f'{block}.smixer.h_conv.conv.weight')[1] == 1
        arch['depths'] += (depth, )
        arch['expand_ratios'] += (hidden // channels[stage], )
        arch['conv_types'] += ('depthwise' if depthwise else 'full', )
    return arch, layers


def _shape(state_dict: Mapping[str, Tensor], name: str) -> torch.Size:
    """The shape of a convolution's weight."""
    if name not in state_dict:
        raise ConversionError(f'not a whole SpaRTAN checkpoint; missing keys:\n  {name}')
    if state_dict[name].ndim != 4:
        raise ConversionError(f'{name} of shape {tuple(state_dict[name].shape)} is not the weight '
                              'of a two-dimensional convolution')
    return state_dict[name].shape


def _official_names(name: str, layers: list[list[int]]) -> list[str]:
    """What the authors call the tensor `name`; two names where theirs are concatenated here."""
    part, *rest = name.split('.', 3)
    if part == 'stem':
        return [f'conv.{".".join(rest)}']

    stage, kind, rest = int(rest[0]), rest[1], rest[2]
    if kind == 'embedding':
        return [f'layers.{layers[stage][0]}.{rest}']

    block, rest = rest.split('.', 1)
    for ours, theirs in _BLOCK_NAMES:
        if rest.startswith(ours):
            rest = theirs + rest[len(ours):]
    layer = f'layers.{layers[stage][int(block) + (stage > 0)]}'
    if rest.startswith('cmixer.proj_in.'):
        return [f'{layer}.cmixer.{half}.{rest.rsplit(".", 1)[1]}' for half in ('theta', 'proj')]
    return [f'{layer}.{rest}']
