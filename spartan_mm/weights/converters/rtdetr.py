"""Official weights of RT-DETR (PyTorch, v1 and v2), D-FINE and DEIM under this package's names, and
back.

The names that a model has follow from its architecture, which is read from the tensors' names and
shapes. Each function raises a CheckpointError that lists the keys that are missing or left over,
the shapes that differ, and what one side cannot hold.
"""
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...text import join
from . import rtdetr_layout as table
from .names import StateDict, strip_prefix
from .rtdetr_layout import BACKBONE
from .spartan import convert_spartan_backbone, export_spartan_backbone

# Where a SpaRTAN stands in an official detector, and timm's HGNetv2 in one of ours.
_SPARTAN = f'{BACKBONE}net.'
_TIMM = f'{BACKBONE}model.'
# timm's names of HGNetv2 by channels of the stem and layers in a block.
_HGNETS = {(16, 3): 'b0', (32, 3): 'b1', (32, 4): 'b2', (32, 5): 'b3', (48, 6): 'b4', (64, 6): 'b5',
           (96, 6): 'b6'}
# What version 2 and D-FINE call elements 0 and 1 of version 1.
_FIRST_VERSION = r'^(encoder\.input_proj\.\d+|decoder\.enc_output)\.(conv|proj|norm)\.'
_SECOND_VERSION = {'encoder': ('conv', 'norm'), 'decoder': ('proj', 'norm')}
# The published value of a parameter that is never trained, see edge_distances.
_UP = 0.5


def convert_resnet_vd(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Convert a backbone's official weights (PResNet, as published for pretraining) for ResNetVd.

    Args:
        state_dict: Tensors under their official names, without `backbone.`.
    """
    layout = table.read_layout([BACKBONE + name for name in state_dict], table.OFFICIAL)
    names = table.tensor_names(layout, table.OFFICIAL)
    return table.to_ours(state_dict, {
        ours.removeprefix(BACKBONE): [theirs.removeprefix(BACKBONE)]
        for ours, [theirs] in names.items() if ours.startswith(BACKBONE)})


def convert_rtdetr(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, dict]:
    """Convert the weights of an official RT-DETR, D-FINE or DEIM for RTDETR.

    The backbone is a ResNet-vd, a SpaRTAN or an HGNetv2. Queries have to be selected by class.

    NOTE: A file doesn't say at which decoder layer a model is evaluated (the third of six for
    R50-m), that it has other than 8 attention heads or 300 queries, that a v2 model samples
    discretely, or that DEIM's activations are SiLU.

    Returns:
        The same tensors under this package's names, and the settings of the `model` in a config
        that they fit.
    """
    state_dict, points, reg_scale = _without_constants(state_dict)
    layout = table.read_layout(state_dict, table.OFFICIAL)
    rest, separate = dict(state_dict), {}
    if any(name.startswith(_SPARTAN) for name in state_dict):
        rest = {name: tensor for name, tensor in rest.items() if not name.startswith(_SPARTAN)}
        separate, arch = convert_spartan_backbone(state_dict, _SPARTAN)
        backbone = dict(type='SpaRTAN', arch=arch, out_indices=(1, 2, 3))
    elif f'{BACKBONE}stem.stem1.conv.weight' in state_dict:
        rest = {name: tensor for name, tensor in rest.items() if not name.startswith(BACKBONE)}
        separate, backbone = _convert_hgnet(strip_prefix(state_dict, BACKBONE), layout.levels)
    elif any(layout.depths):
        frozen = not any(name.startswith(BACKBONE) and name.endswith(table.COUNTER)
                         for name in state_dict)
        backbone = table.resnet_settings(layout, frozen)
    else:
        raise CheckpointError('the backbone is neither a ResNet-vd, a SpaRTAN nor an HGNetv2')
    converted = table.to_ours(rest, table.tensor_names(layout, table.OFFICIAL))
    converted |= {BACKBONE + name: tensor for name, tensor in separate.items()}

    settings = dict(backbone=backbone, **table.read_settings(converted, layout, points=points))
    if layout.distributions:
        settings['bbox_head']['reg_scale'] = reg_scale
    table.check_detector(converted, settings)
    return converted, settings


def export_rtdetr(state_dict: Mapping[str, Tensor],
                  settings: Mapping | None = None) -> tuple[StateDict, dict]:
    """Convert an RTDETR's weights for the official code that has such a model.

    That is D-FINE's or DEIM's for a model of D-FINE's form. Otherwise it is RT-DETR's, version 1,
    or version 2 if layers sample more points on one map than on another.

    Args:
        state_dict: Tensors under this package's names; the backbone is a ResNet-vd, a SpaRTAN or
            timm's HGNetv2.
        settings: What is known of the `model` in the config. What shapes do not show is taken from
            there: sampling points, `reg_scale`, and whether the backbone's BatchNorms are frozen
            (and have no counters officially); without it those of ResNets of depths 50 and 101
            are, if their counters stand at 0.

    Returns:
        The same tensors under their official names, and the settings that they fit.
    """
    settings, layout = read_own_settings(state_dict, settings)
    is_dfine = (layout.distributions, layout.elan, layout.gated, layout.values)
    if is_dfine not in ((False, ) * 3 + (True, ), (True, ) * 3 + (False, )):
        raise CheckpointError(
            'no official code has such a model: RT-DETR\'s has the neck HybridEncoder and '
            'RTDETRDecoder, D-FINE\'s has ELANEncoder and DFINEDecoder with gates and without '
            'projected values')
    exported, rest, frozen = {}, dict(state_dict), is_frozen(settings)
    if not any(layout.depths):
        rest = {name: tensor for name, tensor in rest.items() if not name.startswith(BACKBONE)}
        exported = (export_spartan_backbone(strip_prefix(state_dict, BACKBONE), _SPARTAN)[0]
                    if settings['backbone']['type'] == 'SpaRTAN' else
                    _export_hgnet(strip_prefix(state_dict, _TIMM), frozen))
    exported |= table.from_ours(rest, table.tensor_names(layout, table.OFFICIAL), frozen)
    num_points = settings['decoder']['num_points']
    if layout.distributions or layout.deep_position or not isinstance(num_points, int):
        exported = _with_constants(exported, layout, num_points, settings)
    return exported, settings


def read_own_settings(state_dict: Mapping[str, Tensor],
                      known: Mapping | None = None) -> tuple[dict, table.Layout]:
    """Read the settings of one of our detectors, and check that the tensors are all of it.

    Args:
        state_dict: Tensors under this package's names.
        known: What is known of the `model` in the config. What shapes do not show is taken from
            there.

    Returns:
        The settings, and the counts.
    """
    known = known or {}
    if any('.fused.' in name for name in state_dict):
        raise CheckpointError('the model is fused for inference; convert the checkpoint that it '
                              'was made from')
    layout = table.read_layout(state_dict, table.OURS)
    names = table.tensor_names(layout, table.OFFICIAL)
    backbone = strip_prefix(state_dict, BACKBONE)
    if any(layout.depths):
        table.check_keys(state_dict, names)
        frozen = layout.bottleneck and not any(
            tensor for name, tensor in backbone.items() if name.endswith(table.COUNTER))
        if known.get('backbone', {}).get('norm_cfg'):
            frozen = is_frozen(known)
        found = table.resnet_settings(layout, frozen)
    elif any(name.startswith('stages.') for name in backbone):
        table.check_keys([name for name in state_dict if not name.startswith(BACKBONE)], names)
        arch = export_spartan_backbone(backbone)[1]
        found = dict(type='SpaRTAN', arch=arch, out_indices=(1, 2, 3))
    elif 'model.stem.stem1.conv.weight' in backbone:
        table.check_keys([name for name in state_dict if not name.startswith(BACKBONE)], names)
        found = _hgnet_settings(strip_prefix(state_dict, _TIMM), layout.levels,
                                known.get('backbone', {}).get('norm_eval', False))
    else:
        raise CheckpointError('the backbone is neither a ResNetVd, a SpaRTAN nor an HGNetv2 of '
                              'timm, and no other has a place in the official codes or in '
                              'transformers')
    if layout.distributions and not {'decoder', 'bbox_head'} <= {*known}:
        raise CheckpointError('the checkpoint does not say with which config it was trained, and '
                              'num_points and reg_scale of a D-FINE do not show in its weights')

    heads = [known.get(part, {}).get('num_heads', 8) for part in ('neck', 'decoder')]
    points = known.get('decoder', {}).get('num_points', 4)
    settings = dict(backbone=found, **table.read_settings(
        state_dict, layout, *heads, None if isinstance(points, int) else points))
    for part, name in (('neck', 'legacy_position'), ('decoder', 'eval_idx'), ('decoder', 'act'),
                       ('bbox_head', 'act'), ('bbox_head', 'reg_scale')):
        if name in known.get(part, {}):
            settings[part][name] = known[part][name]
    settings |= {name: known[name] for name in ('num_queries', 'dn_cfg') if name in known}
    table.check_detector(state_dict, settings)
    return settings, layout


def is_frozen(settings: Mapping) -> bool:
    """Whether the BatchNorms of the backbone are frozen."""
    backbone = settings['backbone']
    if backbone['type'] == 'TIMMFeatures':
        return backbone.get('norm_eval', False)
    return not backbone.get('norm_cfg', {}).get('requires_grad', True)


def _convert_hgnet(state_dict: Mapping[str, Tensor], levels: int) -> tuple[StateDict, dict]:
    """An official HGNetv2 under timm's names, and its settings."""
    converted = {f'model.{re.sub("^stages[.]", "stages_", name)}': tensor
                 for name, tensor in state_dict.items()}
    counters = {name.removesuffix('running_var') + table.COUNTER[1:] for name in converted
                if name.endswith('.running_var')}
    frozen = not counters & {*converted}
    converted |= {name: torch.tensor(0) for name in counters if frozen}
    return converted, _hgnet_settings(strip_prefix(converted, 'model.'), levels, frozen)


def _export_hgnet(state_dict: Mapping[str, Tensor], frozen: bool) -> StateDict:
    """An HGNetv2 of timm under official names."""
    return {BACKBONE + re.sub('^stages_', 'stages.', name): tensor
            for name, tensor in state_dict.items()
            if not (frozen and name.endswith(table.COUNTER))}


def _hgnet_settings(state_dict: Mapping[str, Tensor], levels: int, frozen: bool) -> dict:
    """What a config says of timm's HGNetv2."""
    layers = {match[1] for name in state_dict
              if (match := re.match(r'stages_0\.blocks\.0\.layers\.(\d+)\.', name))}
    stem = len(state_dict.get('stem.stem4.conv.weight', ()))
    if (stem, len(layers)) not in _HGNETS:
        raise CheckpointError(f'no HGNetv2 from B0 to B6 has {stem} channels in its stem and '
                              f'{len(layers)} layers in a block')
    found = dict(type='TIMMFeatures', model_name=f'hgnetv2_{_HGNETS[stem, len(layers)]}',
                 out_indices=(1, 2, 3)[-levels:])
    return dict(found, norm_eval=True) if frozen else found


def _without_constants(
        state_dict: Mapping[str, Tensor]) -> tuple[StateDict, Sequence[int] | None, float]:
    """The state dict with version 1's names and without its constants, which D-FINE and v2 have.

    Returns:
        It, the sampling points on each map (None if it doesn't tell), and `reg_scale`.
    """
    scales = {name: tensor for name, tensor in state_dict.items()
              if name.endswith('.cross_attn.num_points_scale')}
    points = {name: _read_points(name, scale) for name, scale in scales.items()}
    if len({*points.values()}) > 1:
        raise CheckpointError('decoder layers differ in their numbers of sampling points: '
                              + join([f'{name} has {counts}' for name, counts in points.items()]))
    shared = {name: tensor for name, tensor in state_dict.items()
              if re.fullmatch(r'decoder\.(decoder\.)?(up|reg_scale)', name)}
    for name, tensor in shared.items():
        if name.endswith('up') and tensor.item() != _UP:
            raise CheckpointError(f'{name} is {tensor.item():g}; DFINEHead has {_UP:g}')
    # The anchors are those of a fixed image size; here they follow the image.
    constants = ({*scales, *shared, 'decoder.anchors', 'decoder.valid_mask'}
                 if scales or any('enc_output.proj' in name for name in state_dict) else ())
    renamed = {re.sub(_FIRST_VERSION, lambda match: f'{match[1]}.{int(match[2] == "norm")}.', name):
               tensor for name, tensor in state_dict.items() if name not in constants}
    if 'decoder.tgt_embed.weight' in renamed:
        raise CheckpointError('the queries start from learnt contents (decoder.tgt_embed), which '
                              'RTDETR does not have')
    score, others = (renamed.get(f'decoder.{name}.bias') for name in
                     ('enc_score_head', 'dec_score_head.0'))
    if score is not None and others is not None and len(score) == 1 < len(others):
        raise CheckpointError('the queries are selected without regard to classes (decoder.'
                              'enc_score_head has one output), which RTDETR does not do')
    reg_scale = next((float(tensor) for name, tensor in shared.items()
                      if name.endswith('reg_scale')), 4.)
    return renamed, next(iter(points.values()), None), reg_scale


def _read_points(name: str, scale: Tensor) -> tuple[int, ...]:
    """Sampling points on each map, of a tensor that holds for each point one over their number."""
    values, points = scale.flatten().tolist(), []
    while values:
        points.append(round(1 / values[0]) if values[0] > 0 else 0)
        if not points[-1] or {*values[:points[-1]]} != {values[0]} or len(values) < points[-1]:
            raise CheckpointError(f'{name} does not hold, for each sampling point, one over the '
                                  'number of points on its map')
        values = values[points[-1]:]
    return tuple(points)


def _with_constants(state_dict: Mapping[str, Tensor], layout: table.Layout,
                    num_points: int | Sequence[int], settings: Mapping) -> StateDict:
    """Undo :func:`_without_constants`, for a test on 640 x 640 pixels, as officially."""
    exported = {re.sub(r'^(encoder\.input_proj\.\d+|decoder\.enc_output)\.([01])\.',
                       lambda match: f'{match[1]}.{_SECOND_VERSION[match[1][:7]][int(match[2])]}.',
                       name): tensor for name, tensor in state_dict.items()}
    points = [num_points] * layout.levels if isinstance(num_points, int) else num_points
    scale = torch.tensor([1 / count for count in points for _ in range(count)])
    for layer in range(layout.layers):
        exported[f'decoder.decoder.layers.{layer}.cross_attn.num_points_scale'] = scale.clone()
    if layout.distributions:
        reg_scale = float(settings['bbox_head'].get('reg_scale', 4.))
        for prefix in ('decoder.', 'decoder.decoder.'):
            exported |= {f'{prefix}up': torch.tensor([_UP]),
                         f'{prefix}reg_scale': torch.tensor([reg_scale])}
    exported['decoder.anchors'], exported['decoder.valid_mask'] = _anchors(layout.levels)
    return exported


def _anchors(levels: int, side: int = 640) -> tuple[Tensor, Tensor]:
    """Anchors (1, L, 4) and their validity (1, L, 1), as the official codes store them."""
    anchors = []
    for level in range(levels):
        cells = side >> (6 - levels + level)
        places = (torch.arange(cells) + 0.5) / cells
        rows, columns = torch.meshgrid(places, places, indexing='ij')
        size = torch.full_like(rows, 0.05 * 2 ** level)
        anchors.append(torch.stack([columns, rows, size, size], -1).view(1, -1, 4))
    anchors = torch.cat(anchors, 1)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    return (anchors / (1 - anchors)).log().where(valid, torch.inf), valid
