"""What an RT-DETR's tensors are called here, in the official code and in transformers.

One table for all directions: which modules a model has follows from a few counts (`Layout`), and
each row of the table gives a module's name in the three code bases.
"""
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from ...errors import CheckpointError
from .common import Names, StateDict, check_keys, check_shapes, rename, rename_back

OURS, OFFICIAL, HUGGINGFACE = range(3)

# The leaves of each kind of module; where transformers splits a tensor, its three.
_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_LEAVES = dict(
    conv=dict(weight=['weight']),
    norm={leaf: [leaf] for leaf in _NORM},
    linear=dict(weight=['weight'], bias=['bias']),
    table=dict(weight=['weight']),
    attention=dict(in_proj_weight=['q_proj.weight', 'k_proj.weight', 'v_proj.weight'],
                   in_proj_bias=['q_proj.bias', 'k_proj.bias', 'v_proj.bias'],
                   **{f'out_proj.{leaf}': [f'out_proj.{leaf}'] for leaf in ('weight', 'bias')}))

# Where the names show how many there are of something, in the three code bases.
_COUNTED = dict(
    levels=(r'neck\.input_projs\.(\d+)\.', r'encoder\.input_proj\.(\d+)\.',
            r'model\.encoder_input_proj\.(\d+)\.'),
    blocks=(r'neck\.top_down_blocks\.\d+\.blocks\.(\d+)\.',
            r'encoder\.fpn_blocks\.\d+\.bottlenecks\.(\d+)\.',
            r'model\.encoder\.fpn_blocks\.\d+\.bottlenecks\.(\d+)\.'),
    layers=(r'decoder\.layers\.(\d+)\.', r'decoder\.decoder\.layers\.(\d+)\.',
            r'model\.decoder\.layers\.(\d+)\.'))
_PROJECTED = (r'neck\.top_down_blocks\.\d+\.conv3\.', r'encoder\.fpn_blocks\.\d+\.conv3\.',
              r'model\.encoder\.fpn_blocks\.\d+\.conv3\.')
_RESNET_BLOCKS = (r'backbone\.layer{1}\.(\d+)\.', r'backbone\.res_layers\.{0}\.blocks\.(\d+)\.',
                  r'model\.backbone\.model\.encoder\.stages\.{0}\.layers\.(\d+)\.')
_BOTTLENECK = (r'backbone\.layer1\.0\.conv3\.', r'backbone\.res_layers\.0\.blocks\.0\.branch2c\.',
               r'model\.backbone\.model\.encoder\.stages\.0\.layers\.0\.layer\.2\.')


class Layout(NamedTuple):
    """The counts that decide which modules an RT-DETR has.

    Attributes:
        depths: Blocks in each stage of the ResNet-vd; zeros for another backbone.
        bottleneck: Whether these blocks have three convolutions instead of two.
        levels: Maps that the neck takes.
        blocks: RepVGG blocks in a fusion block.
        projected: Whether fusion blocks end in a convolution.
        layers: Decoder layers.
    """

    depths: tuple[int, ...]
    bottleneck: bool
    levels: int
    blocks: int
    projected: bool
    layers: int


class Module(NamedTuple):
    """One module's kind and its names."""

    kind: str
    ours: str
    official: str
    huggingface: str


def read_layout(names: Iterable[str], source: int) -> Layout:
    """Read the counts from a model's names.

    Args:
        names: Names of tensors.
        source: OURS, OFFICIAL or HUGGINGFACE.

    Returns:
        The counts; the largest numbers count, so that a missing tensor does not go unnoticed.
    """
    names = list(names)

    def count(pattern: str) -> int:
        matches = map(re.compile(pattern).match, names)
        return max((int(match[1]) for match in matches if match), default=-1) + 1

    def any_match(pattern: str) -> bool:
        return any(map(re.compile(pattern).match, names))

    return Layout(
        depths=tuple(count(_RESNET_BLOCKS[source].format(stage, stage + 1)) for stage in range(4)),
        bottleneck=any_match(_BOTTLENECK[source]),
        projected=any_match(_PROJECTED[source]),
        **{name: count(patterns[source]) for name, patterns in _COUNTED.items()})


def resnet_modules(layout: Layout) -> Iterator[Module]:
    """The modules of a ResNet-vd, without what stands before its names in a detector."""
    def conv_norm(ours: tuple[str, str], official: str, huggingface: str) -> Iterator[Module]:
        yield Module('conv', ours[0], f'{official}.conv', f'{huggingface}.convolution')
        yield Module('norm', ours[1], f'{official}.norm', f'{huggingface}.normalization')

    for index in range(3):
        yield from conv_norm((f'stem.{3 * index}', f'stem.{3 * index + 1}'),
                             f'conv1.conv1_{index + 1}', f'embedder.embedder.{index}')
    for stage, depth in enumerate(layout.depths):
        for block in range(depth):
            ours = f'layer{stage + 1}.{block}'
            official = f'res_layers.{stage}.blocks.{block}'
            huggingface = f'encoder.stages.{stage}.layers.{block}'
            for index, letter in enumerate('abc' if layout.bottleneck else 'ab'):
                yield from conv_norm((f'{ours}.conv{index + 1}', f'{ours}.bn{index + 1}'),
                                     f'{official}.branch2{letter}', f'{huggingface}.layer.{index}')
            if block == 0:
                # Where the shortcut pools, the pooling is mmdet's element 0. Depths 50 and up have
                # it (with size 1) in the first stage as well.
                first = 0 if stage == 0 and not layout.bottleneck else 1
                pooled = stage > 0
                yield from conv_norm(
                    (f'{ours}.downsample.{first}', f'{ours}.downsample.{first + 1}'),
                    f'{official}.short' + ('.conv' if pooled else ''),
                    f'{huggingface}.shortcut' + ('.1' if pooled else ''))


def detector_modules(layout: Layout) -> Iterator[Module]:
    """The modules of an RT-DETR, without its backbone."""
    def conv_norm(ours: str, official: str, huggingface: str) -> Iterator[Module]:
        for kind, leaf in (('conv', 'conv'), ('norm', 'norm')):
            yield Module(kind, f'{ours}.{leaf}', f'{official}.{leaf}', f'{huggingface}.{leaf}')

    for level in range(layout.levels):
        for index, kind in enumerate(('conv', 'norm')):
            yield Module(kind, f'neck.input_projs.{level}.{kind}',
                         f'encoder.input_proj.{level}.{index}',
                         f'model.encoder_input_proj.{level}.{index}')
            yield Module(kind, f'decoder.input_projs.{level}.{kind}',
                         f'decoder.input_proj.{level}.{kind}',
                         f'model.decoder_input_proj.{level}.{index}')

    aifi = ('neck.aifi', 'encoder.encoder.0.layers.0', 'model.encoder.encoder.0.layers.0')
    yield Module('attention', *(f'{name}.self_attn' for name in aifi))
    for ours, theirs in (('linear1', 'fc1'), ('linear2', 'fc2'), ('norm1', 'self_attn_layer_norm'),
                         ('norm2', 'final_layer_norm')):
        yield Module('linear', f'{aifi[0]}.{ours}', f'{aifi[1]}.{ours}', f'{aifi[2]}.{theirs}')

    for step in range(layout.levels - 1):
        for part in ('lateral_convs', 'downsample_convs'):
            yield from conv_norm(f'neck.{part}.{step}', f'encoder.{part}.{step}',
                                 f'model.encoder.{part}.{step}')
        for ours, theirs in (('top_down_blocks', 'fpn_blocks'), ('bottom_up_blocks', 'pan_blocks')):
            fusion = (f'neck.{ours}.{step}', f'encoder.{theirs}.{step}',
                      f'model.encoder.{theirs}.{step}')
            for part in ('conv1', 'conv2', 'conv3')[:3 if layout.projected else 2]:
                yield from conv_norm(*(f'{name}.{part}' for name in fusion))
            for block in range(layout.blocks):
                for ours_part, part in (('dense', 'conv1'), ('pointwise', 'conv2')):
                    yield from conv_norm(f'{fusion[0]}.blocks.{block}.{ours_part}',
                                         f'{fusion[1]}.bottlenecks.{block}.{part}',
                                         f'{fusion[2]}.bottlenecks.{block}.{part}')

    yield Module('table', 'dn_query_generator.label_embedding', 'decoder.denoising_class_embed',
                 'model.denoising_class_embed')
    yield Module('linear', 'memory_trans_fc', 'decoder.enc_output.0', 'model.enc_output.0')
    yield Module('linear', 'memory_trans_norm', 'decoder.enc_output.1', 'model.enc_output.1')
    for index in range(2):
        yield Module('linear', f'decoder.query_pos_head.{2 * index}',
                     f'decoder.query_pos_head.layers.{index}',
                     f'model.decoder.query_pos_head.layers.{index}')

    heads = []
    for layer in range(layout.layers):
        names = (f'decoder.layers.{layer}', f'decoder.decoder.layers.{layer}',
                 f'model.decoder.layers.{layer}')
        yield Module('attention', *(f'{name}.self_attn' for name in names))
        for ours, theirs in (
                ('cross_attn.sampling_offsets', 'encoder_attn.sampling_offsets'),
                ('cross_attn.attention_weights', 'encoder_attn.attention_weights'),
                ('cross_attn.value_proj', 'encoder_attn.value_proj'),
                ('cross_attn.output_proj', 'encoder_attn.output_proj'),
                ('linear1', 'fc1'), ('linear2', 'fc2'), ('norm1', 'self_attn_layer_norm'),
                ('norm2', 'encoder_attn_layer_norm'), ('norm3', 'final_layer_norm')):
            yield Module('linear', f'{names[0]}.{ours}', f'{names[1]}.{ours}',
                         f'{names[2]}.{theirs}')
        heads.append((f'decoder.dec_score_head.{layer}', f'model.decoder.class_embed.{layer}',
                      f'decoder.dec_bbox_head.{layer}', f'model.decoder.bbox_embed.{layer}'))

    # The last branches are the encoder's.
    heads.append(('decoder.enc_score_head', 'model.enc_score_head',
                  'decoder.enc_bbox_head', 'model.enc_bbox_head'))
    for index, (score, score_there, box, box_there) in enumerate(heads):
        yield Module('linear', f'bbox_head.cls_branches.{index}', score, score_there)
        for linear in range(3):
            yield Module('linear', f'bbox_head.reg_branches.{index}.{2 * linear}',
                         f'{box}.layers.{linear}', f'{box_there}.layers.{linear}')


def tensor_names(modules: Iterable[Module], target: int) -> Names:
    """Our name -> the foreign ones of every tensor in these modules.

    Args:
        modules: Rows of the table.
        target: OFFICIAL or HUGGINGFACE.

    Returns:
        Names by our name.
    """
    names = {}
    for kind, ours, *theirs in modules:
        theirs = theirs[target - 1]
        for leaf, parts in _LEAVES[kind].items():
            parts = parts if target == HUGGINGFACE else [leaf]
            names[f'{ours}.{leaf}'] = [f'{theirs}.{part}' for part in parts]
    return names


def with_prefixes(names: Names, ours: str, theirs: str) -> Names:
    """The names with something put before them on either side."""
    return {f'{ours}{name}': [f'{theirs}{part}' for part in parts] for name, parts in names.items()}


def to_ours(state_dict: Mapping[str, Tensor], names: Names) -> StateDict:
    """Give foreign tensors our names, with a counter for every BatchNorm.

    Args:
        state_dict: Tensors by foreign name. BatchNorms without `num_batches_tracked` are frozen
            ones; nothing reads the counter that they get here.
        names: Foreign names by our name.

    Returns:
        Tensors by our name.

    Raises:
        CheckpointError: Keys are missing or left over; lists them.
    """
    absent = [ours for ours, (theirs, *_) in names.items()
              if ours.endswith('.num_batches_tracked') and theirs not in state_dict]
    converted = rename(state_dict, {ours: theirs for ours, theirs in names.items()
                                    if ours not in absent})
    return converted | {ours: torch.tensor(0) for ours in absent}


def from_ours(state_dict: Mapping[str, Tensor], names: Names, frozen: bool = False) -> StateDict:
    """Give our tensors their foreign names; undoes :func:`to_ours`.

    Args:
        state_dict: Tensors by our name.
        names: Foreign names by our name.
        frozen: Whether the BatchNorms are frozen and have no counters there.

    Returns:
        Tensors by foreign name.

    Raises:
        CheckpointError: Keys are missing or left over; lists them.
    """
    check_keys(state_dict, names)
    kept = [name for name in names if not (frozen and name.endswith('.num_batches_tracked'))]
    return rename_back({name: state_dict[name] for name in kept},
                       {name: names[name] for name in kept})


def read_settings(state_dict: Mapping[str, Tensor], layout: Layout, neck_heads: int = 8,
                  decoder_heads: int = 8) -> dict:
    """What a config says of neck, decoder and head.

    Args:
        state_dict: Tensors by our name.
        layout: The counts.
        neck_heads: Attention heads of the neck, which the shapes don't show; 8 in every published
            model.
        decoder_heads: Those of the decoder.

    Returns:
        Settings of the `model` in a config.

    Raises:
        CheckpointError: The shapes are not those of an RT-DETR.
    """
    try:
        embed_dims, ffn_dims = state_dict['neck.aifi.linear2.weight'].shape
        hidden = len(state_dict['neck.top_down_blocks.0.conv1.conv.weight'])
        decoder_dims, decoder_ffn = state_dict['decoder.layers.0.linear2.weight'].shape
        samples = len(state_dict['decoder.layers.0.cross_attn.attention_weights.bias'])
        in_channels = [state_dict[f'neck.input_projs.{level}.conv.weight'].shape[1]
                       for level in range(layout.levels)]
        num_classes = len(state_dict['bbox_head.cls_branches.0.bias'])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f'the shapes are not those of an RT-DETR: {error}') from error
    num_points, remainder = divmod(samples, decoder_heads * layout.levels)
    if remainder:
        raise CheckpointError(f'the {samples} attention weights of a decoder layer are not equally '
                              f'many for each of {decoder_heads} heads and {layout.levels} maps')
    return dict(
        neck=dict(in_channels=in_channels, embed_dims=embed_dims, num_heads=neck_heads,
                  ffn_dims=ffn_dims, expansion=hidden / embed_dims, num_blocks=layout.blocks),
        decoder=dict(in_channels=[embed_dims] * layout.levels, embed_dims=decoder_dims,
                     num_layers=layout.layers, num_heads=decoder_heads, num_points=num_points,
                     ffn_dims=decoder_ffn),
        bbox_head=dict(num_classes=num_classes, embed_dims=decoder_dims))


def resnet_settings(layout: Layout, frozen: bool) -> dict:
    """What a config says of a ResNet-vd backbone.

    Args:
        layout: The counts.
        frozen: Whether its BatchNorms are frozen.

    Returns:
        The config's `backbone`.

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

    Args:
        state_dict: Tensors by our name.
        settings: The settings, as :func:`read_settings` gives them, and `backbone`.

    Raises:
        CheckpointError: Keys are missing or left over, or shapes differ; lists them.
        KeyError: Nobody has imported ``spartan_mm.detection``.
    """
    known = {name: settings[name] for name in ('backbone', 'decoder')}
    model = dict(known, type='RTDETR', neck=dict(type='HybridEncoder', **settings['neck']),
                 bbox_head=dict(type='RTDETRHead', **settings['bbox_head']))
    try:
        with torch.device('meta'), DefaultScope.overwrite_default_scope('mmdet'):
            expected = {name: tensor.shape
                        for name, tensor in MODELS.build(model).state_dict().items()}
    except ValueError as error:
        raise CheckpointError(f'no RT-DETR has these shapes: {error}') from error
    check_keys(state_dict, expected)
    check_shapes(state_dict, expected)
