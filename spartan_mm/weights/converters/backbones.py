"""The authors' checkpoints of other light backbones in this package's names, and back.

A whole classifier of theirs is a whole classifier here: `backbone.`, `neck.` and `head.`. Keys that
are missing or left over, and shapes that do not fit together, raise a CheckpointError.
"""
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...backbones import neighbours
from ...backbones.neighbours.base import Neighbour
from ...backbones.neighbours.pooling import NormLinear
from .names import StateDict, check_shapes, rename, rename_back, shapes_of

# Patterns in our names and what stands in their place in the authors', one applied after the other.
Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]


def _later(text: str, by: int = 1) -> Callable[[re.Match], str]:
    """Puts a pattern's number, counted on, into `text`."""
    return lambda match: text.format(int(match[1]) + by)


def _stem(name: str) -> Rules:
    """Convolution, norm and activation count on in one list."""
    return [(r'^backbone\.stem\.(\d)\.conv\.', lambda match: f'{name}.{3 * int(match[1])}.'),
            (r'^backbone\.stem\.(\d)\.norm\.', lambda match: f'{name}.{3 * int(match[1]) + 1}.')]


_MOGANET = [
    *_stem('patch_embed1.projection'),
    (r'^backbone\.stages\.(\d)\.embedding\.conv', _later('patch_embed{}.projection')),
    (r'^backbone\.stages\.(\d)\.embedding', _later('patch_embed{}')),
    (r'^backbone\.stages\.(\d)\.norm', _later('norm{}')),
    (r'^backbone\.stages\.(\d)\.blocks', _later('blocks{}')),
    (r'\.layer_scale', '.layer_scale_'),
    (r'\.gate\.proj_in', '.attn.proj_1'),
    (r'\.gate\.proj_out', '.attn.proj_2'),
    (r'\.gate\.contexts\.', '.attn.value.DW_conv'),
    (r'\.gate\.value', '.attn.value.PW_conv'),
    (r'\.gate\.(?=gate|sigma)', '.attn.'),
    (r'\.mlp\.proj_in\.norm', '.norm2'),
    (r'\.mlp\.proj_in\.conv', '.mlp.fc1'),
    (r'\.mlp\.conv', '.mlp.dwconv'),
    (r'\.mlp\.proj_out', '.mlp.fc2'),
    (r'\.sigma$', '.sigma.scale'),
    (r'^head\.fc', 'head'),
]
_UNIREPLKNET = [
    *_stem('downsample_layers.0'),
    (r'^backbone\.stages\.(\d)\.embedding\.conv', r'downsample_layers.\1.0'),
    (r'^backbone\.stages\.(\d)\.embedding\.norm', r'downsample_layers.\1.1'),
    (r'^backbone\.stages\.(\d)\.blocks', r'stages.\1'),
    (r'\.large\.conv', '.lk_origin'),
    (r'\.large\.norm', '.origin_bn'),
    (r'\.small\.(\w+)\.conv', r'.dil_conv_\1'),
    (r'\.small\.(\w+)\.norm', r'.dil_bn_\1'),
    # Merged, a large kernel keeps its place.
    (r'^(stages\.[123].*\.dwconv)\.(?=weight|bias)', r'\1.lk_origin.'),
    (r'\.norm1', '.norm'),
    (r'\.norm2', '.pwconv2.2'),
    (r'\.se\.squeeze', '.se.down'),
    (r'\.se\.expand', '.se.up'),
    (r'\.fc1', '.pwconv1.1'),
    (r'\.fc2', '.pwconv2.0'),
    (r'\.grn', '.act.1'),
    (r'^head\.branches\.0\.norm', 'norm'),
    (r'^head\.branches\.0\.fc', 'head'),
]
_CASVIT = [
    *_stem('patch_embed'),
    (r'^backbone\.stages\.(\d)\.embedding', lambda match: f'network.{2 * int(match[1]) - 1}'),
    (r'^backbone\.stages\.(\d)\.blocks', lambda match: f'network.{2 * int(match[1])}'),
    (r'^(network\.[135])\.conv', r'\1.proj'),
    (r'(?<=\d)\.local\.proj_in\.conv', '.local_perception.network.0'),
    (r'(?<=\d)\.local\.proj_in\.norm', '.local_perception.network.1'),
    (r'(?<=\d)\.local\.conv', '.local_perception.network.2'),
    (r'(?<=\d)\.local\.proj_out', '.local_perception.network.4'),
    (r'\.attention\.qkv\.norm', '.norm1'),
    (r'\.attention\.qkv\.conv', '.attn.qkv'),
    (r'\.attention\.context_(.)\.local\.conv', r'.attn.oper_\1.0.block.0'),
    (r'\.attention\.context_(.)\.local\.norm', r'.attn.oper_\1.0.block.1'),
    (r'\.attention\.context_(.)\.position', r'.attn.oper_\1.0.block.3'),
    (r'\.attention\.context_(.)\.channel', r'.attn.oper_\1.1.block.1'),
    (r'\.attention\.conv', '.attn.dwc'),
    (r'\.attention\.proj', '.attn.proj'),
    (r'\.mlp\.proj_in\.norm', '.norm2'),
    (r'\.mlp\.proj_in\.conv', '.mlp.fc1'),
    (r'\.mlp\.proj_out', '.mlp.fc2'),
    (r'^neck\.layer', 'norm'),
    (r'^head\.branches\.0\.fc', 'head'),
    (r'^head\.branches\.1\.fc', 'dist_head'),
]
_LSNET = [
    (r'^head\.branches\.0\.fc', 'head.l'),
    (r'^head\.branches\.0', 'head'),
    (r'^head\.branches\.1\.fc', 'head_dist.l'),
    (r'^head\.branches\.1', 'head_dist'),
    (r'\.conv\.(?=\w+$)', '.c.'),
    (r'\.norm\.(?=\w+$)', '.bn.'),
    (r'^backbone\.stem\.(\d)', lambda match: f'patch_embed.{2 * int(match[1])}'),
    (r'^backbone\.stages\.(\d)\.embedding', _later('blocks{}')),
    (r'^backbone\.stages\.0\.blocks', 'blocks1'),
    # Blocks are counted on after the two layers that halve the map.
    (r'^backbone\.stages\.(\d)\.blocks\.(\d+)',
     lambda match: f'blocks{int(match[1]) + 1}.{int(match[2]) + 2}'),
    (r'(?<=\d)\.proj_in', '.ffn.m.pw1'),
    (r'(?<=\d)\.proj_out', '.ffn.m.pw2'),
    (r'\.mixer\.point', '.mixer.conv1'),
    (r'\.mixer\.se\.squeeze', '.se.fc1'),
    (r'\.mixer\.se\.expand', '.se.fc2'),
    (r'\.mixer\.squeeze', '.mixer.lkp.cv1'),
    (r'\.mixer\.see', '.mixer.lkp.cv2'),
    (r'\.mixer\.mix', '.mixer.lkp.cv3'),
    (r'\.mixer\.predict', '.mixer.lkp.cv4'),
    (r'\.mixer\.kernel_norm', '.mixer.lkp.norm'),
    (r'\.mixer\.out_norm', '.mixer.bn'),
    (r'\.mixer\.biases', '.mixer.m.attention_biases'),
    (r'\.mixer\.qkv', '.mixer.m.qkv'),
    (r'\.mixer\.query', '.mixer.m.dw'),
    (r'\.mixer\.proj', '.mixer.m.proj.1'),
]
_AFFNET = [
    (r'^backbone\.stem\.0', 'conv_1.block'),
    (r'^backbone\.stem\.1', 'layer_1.0.block'),
    (r'^backbone\.stages\.(\d)\.embedding', _later('layer_{}.0.block', 2)),
    (r'^backbone\.stages\.0\.blocks\.(\d)', _later('layer_2.{}.block')),
    (r'^backbone\.stages\.(\d)\.blocks\.0', _later('layer_{}.1', 2)),
    # The norm stands in one list with the units, of which there are so many.
    (r'^layer_([345])\.1\.norm',
     lambda match: f'layer_{match[1]}.1.global_rep.{(2, 4, 3)[int(match[1]) - 3]}'),
    (r'\.units', '.global_rep'),
    (r'\.mlp', '.mlp.block'),
    (r'\.expand', '.exp_1x1.block'),
    (r'\.conv\.(?=conv|norm)', '.conv_3x3.block.'),
    (r'\.reduce', '.red_1x1.block'),
    (r'\.proj', '.conv_proj.block'),
    (r'\.fuse', '.fusion.block'),
    (r'\.filter\.weight', '.filter.w'),
    (r'\.filter\.bias', '.filter.b'),
    (r'^neck\.layer', 'conv_1x1_exp.block'),
    (r'^head\.fc', 'classifier.fc'),
]


class Original(NamedTuple):
    """How the authors of a network name it.

    Attributes:
        backbone: Our class.
        rules: Our names to theirs.
        fc: Their first linear layer.
        norm: Of vectors, before each linear layer, see :class:`NormLinear`.
        second: Their second linear layer, which distilled weights have; '' if there never is one.
        neck: Makes the neck of an arch, if it has weights.
    """

    backbone: type[Neighbour]
    rules: Rules
    fc: str
    norm: str | None = None
    second: str = ''
    neck: Callable[[Mapping], nn.Module] | None = None


ORIGINALS = {
    'moganet': Original(neighbours.MogaNet, _MOGANET, 'head'),
    'unireplknet': Original(neighbours.UniRepLKNet, _UNIREPLKNET, 'head', 'LN'),
    'casvit': Original(neighbours.CASViT, _CASVIT, 'head', None, 'dist_head',
                       lambda arch: neighbours.PoolingNeck(arch['channels'][-1])),
    'lsnet': Original(neighbours.LSNet, _LSNET, 'head.l', 'BN', 'head_dist.l'),
    'affnet': Original(neighbours.AFFNet, _AFFNET, 'classifier.fc', neck=lambda arch: (
        neighbours.PoolingNeck(arch['channels'][-1], min(4 * arch['channels'][-1], 960)))),
}

# Of LSNet's attention: which bias belongs to a pair of positions. It follows from the table's size.
_PAIRS = 'attention_bias_idxs'


def convert_backbone(name: str, state_dict: Mapping[str, Tensor]
                     ) -> tuple[StateDict, dict[str, Any], bool]:
    """Convert a classifier of the authors into an ``ImageClassifier`` of mmpretrain.

    Args:
        name: A key of ORIGINALS.
        state_dict: All its tensors, by the authors' names.

    Returns:
        The weights; what the backbone is built with; whether they are of the form for inference, as
        UniRepLKNet's authors merge it.
    """
    original = ORIGINALS[name]
    given = {key: value for key, value in state_dict.items() if not key.endswith(_PAIRS)}
    deploy = name == 'unireplknet' and not any('origin_bn' in key for key in given)
    settings, shapes = _identify(original, given, deploy, partial(_rename, original.rules))
    converted = rename(given, {ours: [_rename(original.rules, ours)] for ours in shapes})
    check_shapes(converted, shapes)
    return converted, settings, deploy


def export_backbone(name: str, state_dict: Mapping[str, Tensor], deploy: bool = False
                    ) -> tuple[StateDict, dict[str, Any]]:
    """Convert an ``ImageClassifier`` of mmpretrain into a classifier of the authors.

    Args:
        name: A key of ORIGINALS.
        state_dict: All its tensors, by this package's names.
        deploy: Whether they are of the form for inference.

    Returns:
        The weights, as the authors name them, and what the backbone is built with.
    """
    original = ORIGINALS[name]
    settings, shapes = _identify(original, state_dict, deploy, str)
    exported = rename_back(state_dict, {ours: [_rename(original.rules, ours)] for ours in shapes})
    check_shapes(state_dict, shapes)
    if name == 'lsnet':
        pairs = _number_pairs(settings['bias_size'])
        exported |= {key.replace('attention_biases', _PAIRS): pairs.clone()
                     for key in [*exported] if key.endswith('attention_biases')}
    return exported, settings


def _identify(original: Original, given: Mapping[str, Tensor], deploy: bool,
              named: Callable[[str], str]) -> tuple[dict[str, Any], dict[str, torch.Size]]:
    """The known architecture that most tensors fit: its settings, and the shapes of all it has.

    `named` makes the names in `given` of ours.
    """
    settings: dict[str, Any] = dict(type=original.backbone.__name__)
    tables = [value for key, value in given.items() if key.endswith(('biases', named('.biases')))]
    if original.backbone is neighbours.LSNet:
        settings['bias_size'] = math.isqrt(tables[0].shape[-1]) if tables else 4
    branch = 'head.branches.{}.fc.bias'
    branches = 1 + (original.second != '' and named(branch.format(1)) in given)
    first = named('head.fc.bias' if original.norm is None and not original.second
                  else branch.format(0))
    classes = len(given[first]) if first in given else 1000

    def build(arch: str) -> nn.Module:
        backbone = original.backbone(arch, out_indices=-1, **{
            key: value for key, value in settings.items() if key != 'type'})
        if deploy:
            backbone.switch_to_deploy()
        parts, channels = nn.ModuleDict(dict(backbone=backbone)), backbone.out_channels[-1]
        if original.neck:
            parts['neck'] = original.neck(backbone.arch)
            channels = min(4 * channels, 960) if isinstance(
                parts['neck'].layer, nn.Sequential) else channels
        if original.norm is None and not original.second:
            parts['head'] = nn.ModuleDict(dict(fc=nn.Linear(channels, classes)))
        else:
            parts['head'] = nn.ModuleDict(dict(branches=nn.ModuleList(
                NormLinear(channels, classes, original.norm) for _ in range(branches))))
        return parts

    candidates = {arch: shapes_of(partial(build, arch)) for arch in original.backbone.arch_settings}

    def fitting(arch: str) -> int:
        return sum(getattr(given.get(named(ours)), 'shape', None) == shape
                   for ours, shape in candidates[arch].items())

    best = max(candidates, key=fitting)
    return dict(settings, arch=best), candidates[best]


def _rename(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _number_pairs(side: int) -> Tensor:
    """For each pair of positions on a square map the number of their distance, (HW, HW)."""
    rows, columns = torch.arange(side**2) // side, torch.arange(side**2) % side
    rows, columns = ((at[:, None] - at).abs() for at in (rows, columns))
    return rows * side + columns
