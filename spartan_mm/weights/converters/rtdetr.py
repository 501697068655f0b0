"""Official RT-DETR (PyTorch, v1 and v2) weights under this package's names, and back (v1).

The names that a model has follow from its architecture, which is read from the tensors' names and
shapes. Each function raises a CheckpointError that lists the keys that are missing or left over,
the shapes that differ, and what one side cannot hold.
"""
import itertools
import re
from collections.abc import Mapping

from torch import Tensor

from ...errors import CheckpointError
from ...text import join
from . import rtdetr_layout as table
from .names import StateDict, strip_prefix
from .rtdetr_layout import BACKBONE
from .spartan import convert_spartan_backbone, export_spartan_backbone

# Where a SpaRTAN stands in an official detector.
_SPARTAN = f'{BACKBONE}net.'


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
    """Convert an official RT-DETR's weights for RTDETR, backbone ResNet-vd or SpaRTAN.

    Version 2 is the same model if its queries are selected by class. One whose query positions take
    three linear layers is DEIM's, which has SiLU for ReLU, too.

    NOTE: A file doesn't say at which decoder layer a model is evaluated (the third of six for
    R50-m), that it has other than 8 attention heads or 300 queries, or that a v2 model samples
    discretely.

    Returns:
        The same tensors under this package's names, and the settings of the `model` in a config
        that they fit.
    """
    state_dict, points = _without_v2(state_dict)
    layout = table.read_layout(state_dict, table.OFFICIAL)
    rest = {name: tensor for name, tensor in state_dict.items() if not name.startswith(_SPARTAN)}
    spartan = {}
    if len(rest) < len(state_dict):
        spartan, arch = convert_spartan_backbone(state_dict, _SPARTAN)
        backbone = dict(type='SpaRTAN', arch=arch, out_indices=(1, 2, 3))
    elif any(layout.depths):
        frozen = not any(name.startswith(BACKBONE) and name.endswith(table.COUNTER)
                         for name in state_dict)
        backbone = table.resnet_settings(layout, frozen)
    else:
        raise CheckpointError('the backbone is neither a ResNet-vd nor a SpaRTAN')
    converted = table.to_ours(rest, table.tensor_names(layout, table.OFFICIAL))
    converted |= {BACKBONE + name: tensor for name, tensor in spartan.items()}

    settings = dict(backbone=backbone, **table.read_settings(converted, layout, points=points))
    table.check_detector(converted, settings)
    return converted, settings


def export_rtdetr(state_dict: Mapping[str, Tensor],
                  settings: Mapping | None = None) -> tuple[StateDict, dict]:
    """Convert an RTDETR's weights for the official code, version 1.

    Args:
        state_dict: Tensors under this package's names; the backbone is a ResNet-vd or a SpaRTAN.
        settings: What is known of the `model` in the config. Only whether the backbone's BatchNorms
            are frozen (and have no counters officially) is taken from there; without it those of
            depths 50 and 101 are, if their counters stand at 0.

    Returns:
        The same tensors under their official names, and the settings that they fit.
    """
    settings, layout = read_own_settings(state_dict, settings)
    exported, rest = {}, dict(state_dict)
    if settings['backbone']['type'] == 'SpaRTAN':
        exported = export_spartan_backbone(strip_prefix(state_dict, BACKBONE), _SPARTAN)[0]
        rest = {name: tensor for name, tensor in rest.items() if not name.startswith(BACKBONE)}
    names = table.tensor_names(layout, table.OFFICIAL)
    return table.from_ours(rest, names, is_frozen(settings)) | exported, settings


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
    if layout.deep_position:
        raise CheckpointError("query positions of three linear layers are DEIM's, which neither "
                              'RT-DETR nor transformers has')
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
    else:
        raise CheckpointError('the backbone is neither a ResNetVd nor a SpaRTAN, and no other has '
                              'a place in the official code or in transformers')

    heads = [known.get(part, {}).get('num_heads', 8) for part in ('neck', 'decoder')]
    settings = dict(backbone=found, **table.read_settings(state_dict, layout, *heads))
    points = known.get('decoder', {}).get('num_points')
    if isinstance(points, list | tuple) and len({*points}) > 1:
        raise CheckpointError(f'the maps get different numbers of sampling points ({join(points)}),'
                              ' which neither version 1 nor transformers has')
    for part, name in (('neck', 'legacy_position'), ('decoder', 'eval_idx')):
        if name in known.get(part, {}):
            settings[part][name] = known[part][name]
    settings |= {name: known[name] for name in ('num_queries', 'dn_cfg') if name in known}
    table.check_detector(state_dict, settings)
    return settings, layout


def is_frozen(settings: Mapping) -> bool:
    """Whether the BatchNorms of the backbone are frozen."""
    return not settings['backbone'].get('norm_cfg', {}).get('requires_grad', True)


def _without_v2(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, list[int] | None]:
    """The state dict without what version 2 has or calls otherwise, and its points on each map.

    These are None where the maps have equally many.
    """
    scales = {name: tensor for name, tensor in state_dict.items()
              if name.endswith('.cross_attn.num_points_scale')}
    # One over the number of points of its map, for each point.
    found = {name: [round(1 / value) if value > 0 else 0 for value in scale.flatten().tolist()]
             for name, scale in scales.items()}
    points = None
    for name, counts in found.items():
        # Neighbouring maps may have as many.
        per_map = [count for count, group in itertools.groupby(counts)
                   for _ in range(sum(1 for _ in group) // max(count, 1))]
        if [count for count in per_map for _ in range(count)] != counts or points not in (
                None, per_map):
            raise CheckpointError(f'{name} gives no number of sampling points for each map that '
                                  'all layers share')
        points = per_map
    if points and len({*points}) == 1:
        points = None
    # The anchors are those of a fixed image size; here they follow the image.
    constants = ({*scales, 'decoder.anchors', 'decoder.valid_mask'}
                 if scales or any('enc_output.proj' in name for name in state_dict) else ())
    renamed = {re.sub(r'^(encoder\.input_proj\.\d+|decoder\.enc_output)\.(conv|proj|norm)\.',
                      lambda match: f'{match[1]}.{int(match[2] == "norm")}.', name): tensor
               for name, tensor in state_dict.items() if name not in constants}
    if 'decoder.tgt_embed.weight' in renamed:
        raise CheckpointError('the queries start from learnt contents (decoder.tgt_embed), which '
                              'RTDETR does not have')
    score, others = (renamed.get(f'decoder.{name}.bias') for name in
                     ('enc_score_head', 'dec_score_head.0'))
    if score is not None and others is not None and len(score) == 1 < len(others):
        raise CheckpointError('the queries are selected without regard to classes (decoder.'
                              'enc_score_head has one output), which RTDETR does not do')
    return renamed, points
