"""The authors' SpaRTAN checkpoints in this package's names, and back."""
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ...backbones import SpaRTAN
from ...errors import CheckpointError
from .common import Names, StateDict, check_shapes, rename, rename_back, strip_prefix

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
_HEAD_NAMES: Names = {'head.fc.weight': ['linear.weight'], 'head.fc.bias': ['linear.bias']}


def convert_spartan(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, dict]:
    """Convert a classifier of the authors into an ``ImageClassifier`` of mmpretrain.

    Args:
        state_dict: The released model's weights, all of them and nothing else.

    Returns:
        The weights, under ``backbone.`` and ``head.fc.`` (a ``LinearClsHead``; its pooling neck
        has none), and the backbone's `arch`.

    Raises:
        CheckpointError: If keys are missing or left over, or shapes do not fit together.
    """
    head_names = [name for names in _HEAD_NAMES.values() for name in names]
    head = {name: value for name, value in state_dict.items() if name in head_names}
    backbone = {name: value for name, value in state_dict.items() if name not in head}

    backbone, arch = convert_spartan_backbone(backbone)
    converted = {f'backbone.{name}': value for name, value in backbone.items()}
    converted |= rename(head, _HEAD_NAMES)
    _check_head(converted, arch)
    return converted, arch


def export_spartan(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, dict]:
    """Convert an ``ImageClassifier`` of mmpretrain into a classifier of the authors.

    Args:
        state_dict: The classifier's weights: ``backbone.`` is a SpaRTAN, ``head.fc.`` its linear
            layer; all of them and nothing else.

    Returns:
        The weights, as the authors name them, and the backbone's `arch`.

    Raises:
        CheckpointError: If keys are missing or left over, or shapes do not fit together.
    """
    head = {name: value for name, value in state_dict.items() if not name.startswith('backbone.')}
    exported, arch = export_spartan_backbone(strip_prefix(state_dict, 'backbone.'))
    exported |= rename_back(head, _HEAD_NAMES)
    _check_head(head, arch)
    return exported, arch


def _check_head(state_dict: Mapping[str, Tensor], arch: dict) -> None:
    num_classes = state_dict['head.fc.bias'].numel()
    check_shapes(state_dict, {'head.fc.weight': (num_classes, arch['channels'][-1]),
                              'head.fc.bias': (num_classes, )})


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
        CheckpointError: If keys are missing or left over, or shapes do not fit together.
    """
    state_dict = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
    arch, layers = _read_arch(state_dict, prefix)

    expected = _expected(arch, _shape(state_dict, f'{prefix}conv.0.conv.weight')[1])
    converted = rename(state_dict, _names(expected, layers, prefix))
    for name, value in converted.items():
        if name.endswith('.complex_weight'):
            # The released (1, 1, 1, pairs, 2) holds the same numbers in the same order.
            converted[name] = value.flatten(0, -2)
    check_shapes(converted, expected)
    return converted, arch


def export_spartan_backbone(state_dict: Mapping[str, Tensor],
                            prefix: str = '') -> tuple[StateDict, dict]:
    """Convert a ``SpaRTAN`` into a backbone of the authors, alone or for a larger model.

    Args:
        state_dict: The backbone's weights, all of them and nothing else.
        prefix: What to put before the backbone's new names, as 'backbone.net.' in a detector.

    Returns:
        The weights, as the authors name them, and the backbone's `arch`.

    Raises:
        CheckpointError: If keys are missing or left over, or shapes do not fit together.
    """
    arch, layers = _read_own_arch(state_dict)
    expected = _expected(arch, _shape(state_dict, 'stem.0.conv.weight')[1])
    names = _names(expected, layers, prefix)
    exported = rename_back(state_dict, names)
    check_shapes(state_dict, expected)
    for name, (theirs, *_) in names.items():
        if name.endswith('.complex_weight'):
            exported[theirs] = exported[theirs][None, None, None]
    return exported, arch


def _expected(arch: dict, in_channels: int) -> dict[str, torch.Size]:
    """The tensors of such a ``SpaRTAN``, by name, with their shapes."""
    with torch.device('meta'):
        try:
            state_dict = SpaRTAN(arch, in_channels, out_indices=-1).state_dict()
        except ValueError as error:
            raise CheckpointError(f'the shapes are not those of a SpaRTAN: {error}') from error
    return {name: value.shape for name, value in state_dict.items()}


def _names(ours: Iterable[str], layers: list[list[int]], prefix: str) -> Names:
    return {name: [prefix + theirs for theirs in _official_names(name, layers)] for name in ours}


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
        raise CheckpointError('not a whole SpaRTAN checkpoint; missing keys:',
                              *(f'{prefix}layers.{number}.*' for number in sorted(gaps)))

    layers, channels = [[]], [_shape(state_dict, f'{prefix}conv.1.conv.weight')[0]]
    for number in sorted(numbers):
        if number not in blocks:
            layers.append([])
            channels.append(_shape(state_dict, f'{prefix}layers.{number}.conv.weight')[0])
        layers[-1].append(number)

    depths = [len(members) - (stage > 0) for stage, members in enumerate(layers)]
    _check_depths(depths)

    def last_block(name: str) -> list[torch.Size]:
        return [_shape(state_dict, f'{prefix}layers.{members[-1]}.{name}') for members in layers]

    stem_channels = _shape(state_dict, f'{prefix}conv.0.conv.weight')[0]
    return _make_arch(stem_channels, depths, channels, last_block('cmixer.proj_out.weight'),
                      last_block('smixer.h_conv.conv.weight')), layers


def _read_own_arch(state_dict: Mapping[str, Tensor]) -> tuple[dict, list[list[int]]]:
    """The architecture of a ``SpaRTAN``, and the numbers that its layers have at the authors'."""
    blocks = {(int(match[1]), int(match[2])) for match in
              (re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', name) for name in state_dict) if match}
    num_stages = max((stage for stage, _ in blocks), default=-1) + 1
    depths = [max((block for at, block in blocks if at == stage), default=-1) + 1
              for stage in range(num_stages)]
    layers, total = [], 0
    for stage, depth in enumerate(depths):
        count = depth + (stage > 0)
        layers.append(list(range(total, total + count)))
        total += count
    _check_depths(depths)

    def last_block(name: str) -> list[torch.Size]:
        return [_shape(state_dict, f'stages.{stage}.blocks.{depth - 1}.{name}')
                for stage, depth in enumerate(depths)]

    hidden = last_block('cmixer.proj_out.weight')
    return _make_arch(_shape(state_dict, 'stem.0.conv.weight')[0], depths,
                      [shape[0] for shape in hidden], hidden,
                      last_block('smixer.high_freq.conv.weight')), layers


def _check_depths(depths: Sequence[int]) -> None:
    for stage, depth in enumerate(depths, start=1):
        if depth < 1:
            raise CheckpointError(f'not a whole SpaRTAN checkpoint: stage {stage} has no block')


def _make_arch(stem_channels: int, depths: Sequence[int], channels: Sequence[int],
               proj_out: Sequence[torch.Size], high_freq: Sequence[torch.Size]) -> dict:
    """An `arch` from the stages' depths and widths and the shapes of weights in their blocks."""
    return dict(
        stem_channels=stem_channels, depths=tuple(depths), channels=tuple(channels),
        expand_ratios=tuple(shape[1] // width
                            for shape, width in zip(proj_out, channels, strict=True)),
        conv_types=tuple('depthwise' if shape[1] == 1 else 'full' for shape in high_freq))


def _shape(state_dict: Mapping[str, Tensor], name: str) -> torch.Size:
    """The shape of a convolution's weight."""
    if name not in state_dict:
        raise CheckpointError('not a whole SpaRTAN checkpoint; missing keys:', name)
    if state_dict[name].ndim != 4:
        raise CheckpointError(f'{name} of shape {tuple(state_dict[name].shape)} is not the weight '
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
