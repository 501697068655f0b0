"""What the tensors of an RT-DETR or a D-FINE are called here, in the official codes and in
transformers.

One table for all directions: which modules a model has follows from a few counts (`Layout`), and
each row of the table gives a module's name in the three code bases.
"""
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from ...errors import CheckpointError
from .names import Names, StateDict, check_keys, check_shapes, rename, rename_back, shapes_of

OURS, OFFICIAL, HUGGINGFACE = range(3)
BACKBONE = 'backbone.'
COUNTER = '.num_batches_tracked'

# The leaves of each kind of module; transformers splits some.
_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_LEAVES = dict(
    conv=('weight', ), norm=_NORM, linear=('weight', 'bias'), table=('weight', ),
    unit=('conv.weight', *(f'norm.{leaf}' for leaf in _NORM)),
    attention=('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias'))
_SPLIT = {f'in_proj_{leaf}': [f'{part}_proj.{leaf}' for part in 'qkv']
          for leaf in ('weight', 'bias')}

# What the names of a part's modules begin with: here, in the official code, in transformers.
_BLOCK = ('backbone.layer{next}.{block}.', 'backbone.res_layers.{stage}.blocks.{block}.',
          'model.backbone.model.encoder.stages.{stage}.layers.{block}.')
_LAYER = ('decoder.layers.{layer}.', 'decoder.decoder.layers.{layer}.',
          'model.decoder.layers.{layer}.')
_ATTENTION = ('decoder.layers.{layer}.cross_attn.', 'decoder.decoder.layers.{layer}.cross_attn.',
              'model.decoder.layers.{layer}.encoder_attn.')
_FUSION = ('neck.{path[0]}.{step}.', 'encoder.{path[1]}.{step}.', 'model.encoder.{path[1]}.{step}.')
_STAGE = ('neck.{path[0]}.{step}.stages.{stage}.', 'encoder.{path[1]}.{step}.cv{stage_name}.')
_PATHS = ('top_down_blocks', 'fpn_blocks'), ('bottom_up_blocks', 'pan_blocks')

# The modules of each part: their kind, and how their names go on, of which one that is left out is
# the one before it.
_PARTS = dict(
    stem=(('backbone.stem.', 'backbone.conv1.conv1_',
           'model.backbone.model.embedder.embedder.'), '''
        conv  0  1.conv  0.convolution
        norm  1  1.norm  0.normalization
        conv  3  2.conv  1.convolution
        norm  4  2.norm  1.normalization
        conv  6  3.conv  2.convolution
        norm  7  3.norm  2.normalization'''),
    block=(_BLOCK, '''
        conv  conv1  branch2a.conv  layer.0.convolution
        norm  bn1    branch2a.norm  layer.0.normalization
        conv  conv2  branch2b.conv  layer.1.convolution
        norm  bn2    branch2b.norm  layer.1.normalization'''),
    bottleneck=(_BLOCK, '''
        conv  conv3  branch2c.conv  layer.2.convolution
        norm  bn3    branch2c.norm  layer.2.normalization'''),
    # Where the shortcut pools, the pooling is mmdet's element 0. Depths 50 and up have it (with
    # size 1) in the first stage as well.
    shortcut=(_BLOCK, '''
        conv  downsample.{first[0]}  short.conv  shortcut.convolution
        norm  downsample.{first[1]}  short.norm  shortcut.normalization'''),
    pooled_shortcut=(_BLOCK, '''
        conv  downsample.1  short.conv.conv  shortcut.1.convolution
        norm  downsample.2  short.conv.norm  shortcut.1.normalization'''),
    neck_input=(('neck.input_projs.{level}.', 'encoder.input_proj.{level}.',
                 'model.encoder_input_proj.{level}.'), '''
        conv  conv  0
        norm  norm  1'''),
    decoder_input=(('decoder.input_projs.{level}.', 'decoder.input_proj.{level}.',
                    'model.decoder_input_proj.{level}.'), '''
        conv  conv  conv  0
        norm  norm  norm  1'''),
    aifi=(('neck.aifi.', 'encoder.encoder.0.layers.0.', 'model.encoder.encoder.0.layers.0.'), '''
        attention  self_attn
        linear     linear1  linear1  fc1
        linear     linear2  linear2  fc2
        linear     norm1    norm1    self_attn_layer_norm
        linear     norm2    norm2    final_layer_norm'''),
    step=(('neck.', 'encoder.', 'model.encoder.'), '''
        unit  lateral_convs.{step}
        unit  downsample_convs.{step}'''),
    fusion=(_FUSION, '''
        unit  conv1
        unit  conv2'''),
    projection=(_FUSION, '''
        unit  conv3'''),
    elan_step=(('neck.', 'encoder.'), '''
        unit  lateral_convs.{step}
        unit  downsample_convs.{step}.pointwise  downsample_convs.{step}.0.cv1
        unit  downsample_convs.{step}.depthwise  downsample_convs.{step}.0.cv2'''),
    elan=(_FUSION[:2], '''
        unit  conv1  cv1
        unit  conv2  cv4'''),
    elan_stage=(_STAGE, '''
        unit  0.conv1
        unit  0.conv2
        unit  1'''),
    elan_block=(_STAGE, '''
        unit  0.blocks.{block}.dense      0.bottlenecks.{block}.conv1
        unit  0.blocks.{block}.pointwise  0.bottlenecks.{block}.conv2'''),
    fusion_block=(_FUSION, '''
        unit  blocks.{block}.dense      bottlenecks.{block}.conv1
        unit  blocks.{block}.pointwise  bottlenecks.{block}.conv2'''),
    queries=(('', 'decoder.', 'model.'), '''
        table   dn_query_generator.label_embedding  denoising_class_embed
        linear  memory_trans_fc                     enc_output.0
        linear  memory_trans_norm                   enc_output.1
        linear  decoder.query_pos_head.0  query_pos_head.layers.0  decoder.query_pos_head.layers.0
        linear  decoder.query_pos_head.2  query_pos_head.layers.1  decoder.query_pos_head.layers.1
        '''),
    deep_position=(('', 'decoder.', 'model.'), '''
        linear  decoder.query_pos_head.4  query_pos_head.layers.2  decoder.query_pos_head.layers.2
        '''),
    layer=(_LAYER, '''
        attention  self_attn
        linear     linear1  linear1  fc1
        linear     linear2  linear2  fc2
        linear     norm1    norm1    self_attn_layer_norm
        linear     norm3    norm3    final_layer_norm'''),
    residual=(_LAYER, '''
        linear  norm2  norm2  encoder_attn_layer_norm'''),
    gate=(_LAYER[:2], '''
        linear  gateway.gate
        linear  gateway.norm'''),
    cross_attention=(_ATTENTION, '''
        linear  sampling_offsets
        linear  attention_weights'''),
    values=(_ATTENTION, '''
        linear  value_proj
        linear  output_proj'''),
    heads=(('bbox_head.', 'decoder.', 'model.'), '''
        linear  cls_branches.{head}    {kind}_score_head{at}          {score}{at}
        linear  reg_branches.{head}.0  {kind}_bbox_head{at}.layers.0  {box}{at}.layers.0
        linear  reg_branches.{head}.2  {kind}_bbox_head{at}.layers.1  {box}{at}.layers.1
        linear  reg_branches.{head}.4  {kind}_bbox_head{at}.layers.2  {box}{at}.layers.2'''),
    base=(('bbox_head.', 'decoder.'), '''
        linear  base_branch.0  pre_bbox_head.layers.0
        linear  base_branch.2  pre_bbox_head.layers.1
        linear  base_branch.4  pre_bbox_head.layers.2'''),
    quality=(('bbox_head.quality_branches.{layer}.',
              'decoder.decoder.lqe_layers.{layer}.reg_conf.'), '''
        linear  0  layers.0
        linear  2  layers.1'''),
)


class Layout(NamedTuple):
    """The counts that decide which modules an RT-DETR has.

    Attributes:
        depths: Blocks in each stage of the ResNet-vd; zeros for another backbone.
        bottleneck: Whether these blocks have three convolutions instead of two.
        levels: Maps that the neck takes.
        blocks: RepVGG blocks in a fusion block.
        projected: Whether fusion blocks end in a convolution.
        layers: Decoder layers.
        elan: Whether the neck is D-FINE's.
        distributions: Whether the decoder refines distributions, as D-FINE's.
        gated: Whether its layers have gates.
        values: Whether its cross-attention projects values.
        inputs: Whether it projects the neck's maps.
        deep_position: Whether query positions take three linear layers, as DEIM's RT-DETRs'.
    """

    depths: tuple[int, ...]
    bottleneck: bool
    levels: int
    blocks: int
    projected: bool
    layers: int
    elan: bool = False
    distributions: bool = False
    gated: bool = False
    values: bool = True
    inputs: bool = True
    deep_position: bool = False


@cache
def _rows(part: str) -> list[list[str]]:
    """The kinds of a part's modules, and their whole names."""
    prefixes, text = _PARTS[part]
    rows = [line.split() for line in text.strip().splitlines()]
    return [[kind, *(prefix + name for prefix, name in
                     zip(prefixes, [*names, names[-1], names[-1]], strict=False))]
            for kind, *names in rows]


def read_layout(names: Iterable[str], source: int) -> Layout:
    """Read the counts from a model's names, of which the largest numbers count.

    So a missing tensor does not go unnoticed. `source` is OURS, OFFICIAL or HUGGINGFACE.
    """
    names = list(names)

    def find(part: str, **numbers) -> Iterator[re.Match]:
        for _, *templates in _rows(part):
            if source >= len(templates):
                continue
            pattern = re.compile(templates[source].replace('.', r'\.').format(**numbers) + r'\.')
            yield from filter(None, map(pattern.match, names))

    def count(part: str, **numbers) -> int:
        return max((int(match[1]) for match in find(part, **numbers)), default=-1) + 1

    # What has more digits is no number of a model, and left over.
    number = r'(\d{1,3})'
    any_step = dict(step=r'\d+', path=_PATHS[0], stage=r'\d+', stage_name=r'\d+')
    elan, distributions = any(find('elan_stage', **any_step)), any(find('base'))
    return Layout(
        depths=tuple(count('block', stage=stage, next=stage + 1, block=number)
                     for stage in range(4)),
        bottleneck=any(find('bottleneck', stage=0, next=1, block=0)),
        levels=count('neck_input', level=number),
        blocks=count('elan_block' if elan else 'fusion_block', block=number, **any_step),
        projected=any(find('projection', **any_step)),
        layers=count('layer', layer=number),
        elan=elan, distributions=distributions,
        gated=any(find('gate', layer=number)),
        values=not distributions or any(find('values', layer=number)),
        inputs=not distributions or any(find('decoder_input', level=number)),
        deep_position=any(find('deep_position')))


def _modules(layout: Layout) -> Iterator[list[str]]:
    """Each module's kind, and its names by OURS, OFFICIAL and, where it has one, HUGGINGFACE."""
    def fill(part: str, **numbers) -> Iterator[list[str]]:
        for kind, *templates in _rows(part):
            yield [kind, *(template.format(**numbers) for template in templates)]

    if any(layout.depths):
        yield from fill('stem')
    for stage, depth in enumerate(layout.depths):
        for block in range(depth):
            at = dict(stage=stage, next=stage + 1, block=block)
            yield from fill('block', **at)
            if layout.bottleneck:
                yield from fill('bottleneck', **at)
            if block == 0:
                yield from fill('pooled_shortcut' if stage else 'shortcut', **at,
                                first=(1, 2) if layout.bottleneck else (0, 1))

    for level in range(layout.levels):
        yield from fill('neck_input', level=level)
        if layout.inputs:
            yield from fill('decoder_input', level=level)
    yield from fill('aifi')
    for step in range(layout.levels - 1):
        yield from fill('elan_step' if layout.elan else 'step', step=step)
        for path in _PATHS:
            if layout.elan:
                yield from _elan_modules(fill, layout, dict(step=step, path=path))
                continue
            yield from fill('fusion', step=step, path=path)
            if layout.projected:
                yield from fill('projection', step=step, path=path)
            for block in range(layout.blocks):
                yield from fill('fusion_block', step=step, path=path, block=block)

    yield from fill('queries')
    if layout.deep_position:
        yield from fill('deep_position')
    for layer in range(layout.layers):
        yield from fill('layer', layer=layer)
        yield from fill('gate' if layout.gated else 'residual', layer=layer)
        yield from fill('cross_attention', layer=layer)
        if layout.values:
            yield from fill('values', layer=layer)
        if layout.distributions:
            yield from fill('quality', layer=layer)
        yield from fill('heads', head=layer, at=f'.{layer}', kind='dec',
                        score='decoder.class_embed', box='decoder.bbox_embed')
    # The last branches are the encoder's.
    yield from fill('heads', head=layout.layers, at='', kind='enc', score='enc_score_head',
                    box='enc_bbox_head')
    if layout.distributions:
        yield from fill('base')


def _elan_modules(fill: Callable[..., Iterator[list[str]]], layout: Layout,
                  at: dict) -> Iterator[list[str]]:
    """The modules of one of D-FINE's fusion blocks."""
    yield from fill('elan', **at)
    for stage in range(2):
        at |= dict(stage=stage, stage_name=stage + 2)
        yield from fill('elan_stage', **at)
        for block in range(layout.blocks):
            yield from fill('elan_block', block=block, **at)


def tensor_names(layout: Layout, target: int) -> Names:
    """The foreign names of every tensor of an RT-DETR, of its backbone if that is a ResNet-vd.

    Args:
        layout: The counts.
        target: OFFICIAL or HUGGINGFACE.
    """
    split = _SPLIT if target == HUGGINGFACE else {}
    return {f'{names[OURS]}.{leaf}': [f'{names[target]}.{part}' for part in split.get(leaf, [leaf])]
            for kind, *names in _modules(layout) for leaf in _LEAVES[kind]}


def to_ours(state_dict: Mapping[str, Tensor], names: Names) -> StateDict:
    """Give foreign tensors our names, with a counter for every BatchNorm.

    Frozen BatchNorms have no `num_batches_tracked` elsewhere; nothing reads the one they get here.

    Raises:
        CheckpointError: Keys are missing or left over.
    """
    absent = [ours for ours, (theirs, *_) in names.items()
              if ours.endswith(COUNTER) and theirs not in state_dict]
    converted = rename(state_dict, {ours: theirs for ours, theirs in names.items()
                                    if ours not in absent})
    return converted | {ours: torch.tensor(0) for ours in absent}


def from_ours(state_dict: Mapping[str, Tensor], names: Names, frozen: bool) -> StateDict:
    """Give our tensors their foreign names; undoes :func:`to_ours`.

    Frozen BatchNorms of the backbone have no counters there.

    Raises:
        CheckpointError: Keys are missing or left over.
    """
    check_keys(state_dict, names)
    kept = [name for name in names
            if not (frozen and name.startswith(BACKBONE) and name.endswith(COUNTER))]
    return rename_back({name: state_dict[name] for name in kept},
                       {name: names[name] for name in kept})


def read_settings(state_dict: Mapping[str, Tensor], layout: Layout, neck_heads: int = 8,
                  decoder_heads: int = 8, points: Sequence[int] | None = None) -> dict:
    """What a config says of neck, decoder and head.

    Attention heads do not show in shapes; all published models have 8 in both places.

    Args:
        state_dict: Tensors under this package's names.
        layout: The counts.
        neck_heads: Heads of the neck's attention.
        decoder_heads: Heads of the decoder's attentions.
        points: Sampling points of a head on each map; None for equally many.

    Raises:
        CheckpointError: The shapes are not those of an RT-DETR.
    """
    try:
        embed_dims, ffn_dims = state_dict['neck.aifi.linear2.weight'].shape
        hidden = (2 * len(state_dict['neck.top_down_blocks.0.stages.0.1.conv.weight'])
                  if layout.elan else
                  len(state_dict['neck.top_down_blocks.0.conv1.conv.weight']))
        decoder_dims, decoder_ffn = state_dict['decoder.layers.0.linear2.weight'].shape
        samples = len(state_dict['decoder.layers.0.cross_attn.attention_weights.bias'])
        in_channels = [state_dict[f'neck.input_projs.{level}.conv.weight'].shape[1]
                       for level in range(layout.levels)]
        num_classes = len(state_dict['bbox_head.cls_branches.0.bias'])
        edges = len(state_dict['bbox_head.reg_branches.0.4.bias'])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f'the shapes are not those of an RT-DETR: {error}') from error
    heads = decoder_heads * layout.levels
    num_points, remainder = divmod(samples, heads) if heads > 0 else (0, samples)
    if points and len({*points}) > 1:
        num_points, remainder = [*points], samples - decoder_heads * sum(points)
    if remainder:
        raise CheckpointError(f'the {samples} attention weights of a decoder layer are not equally '
                              f'many for each of {decoder_heads} heads and {layout.levels} maps')
    settings = dict(
        neck=dict(in_channels=in_channels, embed_dims=embed_dims, num_heads=neck_heads,
                  ffn_dims=ffn_dims, expansion=hidden / embed_dims, num_blocks=layout.blocks),
        decoder=dict(in_channels=[embed_dims] * layout.levels, embed_dims=decoder_dims,
                     num_layers=layout.layers, num_heads=decoder_heads, num_points=num_points,
                     ffn_dims=decoder_ffn),
        bbox_head=dict(num_classes=num_classes, embed_dims=decoder_dims))
    if layout.deep_position:
        # All that have it have other activations, too.
        settings['decoder'] |= dict(query_pos_layers=3, act='silu')
        settings['bbox_head']['act'] = 'silu'
    if layout.elan:
        settings['neck']['type'] = 'ELANEncoder'
    if layout.distributions:
        settings['decoder'] |= dict(type='DFINEDecoder', gate=layout.gated,
                                    project_values=layout.values)
        settings['bbox_head'] |= dict(type='DFINEHead', reg_max=edges // 4 - 1)
    return settings


def resnet_settings(layout: Layout, frozen: bool) -> dict:
    """What a config says of a ResNet-vd backbone, whose BatchNorms may be frozen.

    Raises:
        CheckpointError: It is none of the known depths.
    """
    depths = {((2, 2, 2, 2), False): 18, ((3, 4, 6, 3), False): 34,
              ((3, 4, 6, 3), True): 50, ((3, 4, 23, 3), True): 101}
    if (layout.depths, layout.bottleneck) not in depths:
        raise CheckpointError(f'no ResNet-vd 18, 34, 50 or 101: its stages have {layout.depths} '
                              f'{"bottleneck" if layout.bottleneck else "basic"} blocks')
    return dict(type='ResNetVd', depth=depths[layout.depths, layout.bottleneck],
                out_indices=(1, 2, 3), norm_cfg=dict(type='BN', requires_grad=not frozen),
                norm_eval=frozen)


def check_detector(state_dict: Mapping[str, Tensor], settings: Mapping) -> None:
    """Insist that a state dict is just that of the detector with these settings.

    The detector is built from mmengine's registry: whoever converts one has to import
    ``spartan_mm.detection`` first, which takes seconds and is not needed for classifiers.

    Raises:
        CheckpointError: Keys are missing or left over, or shapes differ; lists them.
        KeyError: Nobody has imported ``spartan_mm.detection``.
    """
    known = {name: settings[name] for name in ('backbone', 'decoder')}
    model = dict(known, type='RTDETR', neck=dict(type='HybridEncoder') | settings['neck'],
                 bbox_head=dict(type='RTDETRHead') | settings['bbox_head'])
    try:
        with DefaultScope.overwrite_default_scope('mmdet'):
            expected = shapes_of(lambda: MODELS.build(model))
    except ValueError as error:
        raise CheckpointError(f'no RT-DETR has these shapes: {error}') from error
    check_keys(state_dict, expected)
    check_shapes(state_dict, expected)
