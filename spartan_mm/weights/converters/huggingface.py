"""RTDetrForObjectDetection of transformers under this package's names, and back.

transformers itself is not needed. Each function raises a CheckpointError that lists the keys that
are missing or left over, the shapes that differ, and the settings that one side does not have.
"""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...files import write_json
from ..loading import find_state_dict
from ..safe_load import read_foreign
from ..saving import save_checkpoint
from . import rtdetr_layout as table
from .names import StateDict
from .rtdetr import is_frozen, read_own_settings

#: What `write_huggingface` writes: weights, config and the config of the image processor.
HUGGINGFACE_FILES = ('model.safetensors', 'config.json', 'preprocessor_config.json')

# The heads stand in the model, and once more, as the same tensors, in its decoder.
_TIED = {'class_embed.': 'model.decoder.class_embed.', 'bbox_embed.': 'model.decoder.bbox_embed.'}

# What of a config decides on the outputs and can't be chosen in RTDETR. The values are also those
# that transformers assumes where a config doesn't have the entry.
_FIXED = dict(
    activation_function='silu', encoder_activation_function='gelu',
    decoder_activation_function='relu', encoder_layers=1, encode_proj_layers=[2],
    positional_encoding_temperature=10000, normalize_before=False, eval_size=None,
    layer_norm_eps=1e-5, batch_norm_eps=1e-5, num_feature_levels=3, learn_initial_query=False,
    with_box_refine=True, is_encoder_decoder=True, backbone=None, use_timm_backbone=False)
_FIXED_BACKBONE = dict(
    model_type='rt_detr_resnet', num_channels=3, embedding_size=64, hidden_act='relu',
    downsample_in_first_stage=False, downsample_in_bottleneck=False,
    out_features=['stage2', 'stage3', 'stage4'])
_COUNTS = ('encoder_attention_heads', 'decoder_attention_heads', 'decoder_n_points', 'num_queries',
           'num_denoising')
# The second version differs in these and is otherwise the same.
_FIXED_V2 = dict(decoder_method='default', decoder_offset_scale=0.5, decoder_n_levels=3)


def convert_huggingface(state_dict: Mapping[str, Tensor],
                        config: Mapping) -> tuple[StateDict, dict, list[str] | None]:
    """Convert the weights of an RTDetrForObjectDetection, or of its version 2, for RTDETR.

    NOTE: Where maps are not square transformers numbers their tokens as the official code does:
    `neck.legacy_position=True` gives its very numbers there.

    Args:
        state_dict: The model's tensors; of the heads, which it has twice, once is enough.
        config: What its config.json says. Losses and dropout are not looked at.

    Returns:
        The same tensors under this package's names, the settings of the `model` in a config that
        they fit, and the names of the classes, None if it has none.
    """
    _check_config(config)
    state_dict = _without_points_scale(_untied(state_dict), config.get('decoder_n_points', 4))
    layout = table.read_layout(state_dict, table.HUGGINGFACE)
    converted = table.to_ours(state_dict, table.tensor_names(layout, table.HUGGINGFACE))

    frozen = config.get('freeze_backbone_batch_norms', True)
    settings = table.read_settings(converted, layout, config.get('encoder_attention_heads', 8),
                                   config.get('decoder_attention_heads', 8))
    settings |= dict(
        backbone=table.resnet_settings(layout, frozen),
        num_queries=config.get('num_queries', 300),
        dn_cfg=dict(num_queries=config.get('num_denoising', 100),
                    label_noise=config.get('label_noise_ratio', 0.5),
                    box_noise=config.get('box_noise_scale', 1.0)))
    table.check_detector(converted, settings)
    said = _flat(_graph_config(settings))
    del said['backbone_config.out_indices']
    _compare(_flat(config), said, 'config.json does not belong to these weights',
             ', but the weights have {!r}')
    return converted, settings, _read_classes(config, settings['bbox_head']['num_classes'])


def export_huggingface(state_dict: Mapping[str, Tensor], settings: Mapping | None = None,
                       classes: Sequence[str] | None = None) -> tuple[StateDict, dict]:
    """Convert an RTDETR's weights for RTDetrForObjectDetection.

    Args:
        state_dict: Tensors under this package's names; the backbone is a ResNet-vd.
        settings: What is known of the `model` in the config; what is not is as in the published
            models.
        classes: Names of the classes.

    Returns:
        The tensors that transformers itself would save, and what its config.json says.
    """
    settings, layout = read_own_settings(state_dict, settings)
    neck, decoder = settings['neck'], settings['decoder']
    num_classes = settings['bbox_head']['num_classes']
    problems = []
    if settings['backbone']['type'] != 'ResNetVd':
        problems.append(f'backbone {settings["backbone"]["type"]}: only ResNetVd has a place there')
    elif neck['in_channels'] != _hidden_sizes(settings)[1:]:
        problems.append(f'neck.in_channels={neck["in_channels"]}: it takes the maps of the last '
                        'three stages')
    for part, known in (('neck', 'HybridEncoder'), ('decoder', 'RTDETRDecoder')):
        if (given := settings[part].get('type', known)) != known:
            problems.append(f'{part} {given}: it has {known}')
    if not isinstance(decoder['num_points'], int):
        problems.append(f'decoder.num_points={decoder["num_points"]}: it has one number for all')
    if layout.deep_position:
        problems.append('decoder.query_pos_layers=3: it has 2')
    if neck['num_blocks'] != 3:
        problems.append(f'neck.num_blocks={neck["num_blocks"]}: it has 3')
    eval_idx = decoder.get('eval_idx', -1) % layout.layers
    if eval_idx != layout.layers - 1:
        problems.append(f'decoder.eval_idx={eval_idx}: it is evaluated at its last layer, '
                        f'{layout.layers - 1}')
    if classes is not None and len(classes) != num_classes:
        problems.append(f'{len(classes)} names of classes for {num_classes} classes')
    if problems:
        raise CheckpointError("transformers' RTDetrForObjectDetection cannot hold this model:",
                              *problems)

    names = table.tensor_names(layout, table.HUGGINGFACE)
    exported = table.from_ours(state_dict, names, is_frozen(settings))

    labels = list(classes or [f'LABEL_{index}' for index in range(num_classes)])
    config = dict(
        architectures=['RTDetrForObjectDetection'], model_type='rt_detr', **_graph_config(settings),
        id2label={str(index): label for index, label in enumerate(labels)},
        label2id={label: index for index, label in enumerate(labels)})
    return exported, config


def read_huggingface(folder: str | Path) -> tuple[StateDict, dict]:
    """Read the weights, in one safetensors file or several, and the config of a saved model.

    Args:
        folder: What `save_pretrained` wrote, or a download from the hub.

    Returns:
        The tensors and what config.json says.
    """
    folder = Path(folder)
    config = _read_json(folder / 'config.json')
    index = folder / 'model.safetensors.index.json'
    files = ['model.safetensors']
    if not (folder / files[0]).is_file() and index.is_file():
        weight_map = _read_json(index).get('weight_map')
        if not isinstance(weight_map, Mapping):
            raise CheckpointError(f'{index} has no weight_map')
        files = sorted(set(map(str, weight_map.values())))
    if any(Path(file).name != file for file in files):
        raise CheckpointError(f'{index} names files outside of its folder')
    state_dict = {}
    for file in files:
        state_dict |= find_state_dict(read_foreign(folder / file), folder / file)
    return state_dict, config


def write_huggingface(folder: str | Path, state_dict: Mapping[str, Tensor], config: Mapping,
                      preprocessor: Mapping) -> None:
    """Write a folder from which transformers' `from_pretrained` loads model and image processor.

    Args:
        folder: Folder to write into; it is made if need be.
        state_dict: The tensors, under transformers' names.
        config: What config.json is to say.
        preprocessor: What preprocessor_config.json is to say, see :func:`image_processor`.

    Raises:
        UnwritableError: A file cannot be written.
    """
    weights, *texts = (Path(folder, name) for name in HUGGINGFACE_FILES)
    save_checkpoint(state_dict, weights)
    for path, content in zip(texts, (config, preprocessor), strict=True):
        write_json(path, content)


def image_processor(height: int = 640, width: int = 640,
                    data_preprocessor: Mapping | None = None) -> dict:
    """What preprocessor_config.json says of an RTDetrImageProcessor that prepares images as we do.

    Args:
        height: Rows that images are resized to, in pixels.
        width: Columns that images are resized to, in pixels.
        data_preprocessor: The config's; RT-DETR's own divides by 255 and does nothing else.
    """
    given = data_preprocessor or {}
    if data_preprocessor and not given.get('bgr_to_rgb', False):
        raise CheckpointError('the model takes images as BGR (data_preprocessor.bgr_to_rgb is not '
                              "set), which transformers' image processor cannot give")
    mean, std = given.get('mean') or [0] * 3, given.get('std') or [255] * 3
    plain = list(mean) == [0] * 3 and list(std) == [255] * 3
    return dict(
        image_processor_type='RTDetrImageProcessor', do_resize=True,
        size=dict(height=height, width=width), resample=2, do_rescale=True,
        rescale_factor=1 / 255, do_normalize=not plain, image_mean=[value / 255 for value in mean],
        image_std=[value / 255 for value in std], do_pad=False, do_convert_annotations=True,
        format='coco_detection')


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
    except FileNotFoundError:
        raise CheckpointError(f'{path} does not exist; a saved model of transformers is a folder '
                              'with config.json and model.safetensors') from None
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds no JSON object')
    return content


def _untied(state_dict: Mapping[str, Tensor]) -> StateDict:
    """The state dict with each head once, under its name in the decoder."""
    untied = dict(state_dict)
    different = []
    for name, tensor in state_dict.items():
        prefix = next(filter(name.startswith, _TIED), None)
        if prefix is not None:
            inner = _TIED[prefix] + name[len(prefix):]
            if not torch.equal(state_dict.get(inner, tensor), tensor):
                different.append(f'{name}, {inner}')
            untied[inner] = untied.pop(name)
    if different:
        raise CheckpointError('these heads, one of which repeats the other, differ:', *different)
    return untied


def _without_points_scale(state_dict: StateDict, points: int) -> StateDict:
    """The state dict without version 2's constants, one over the number of a map's points."""
    scales = {name: tensor for name, tensor in state_dict.items()
              if name.endswith('.encoder_attn.n_points_scale')}
    for name, scale in scales.items():
        if not torch.allclose(scale.float() * points, torch.tensor(1.)):
            raise CheckpointError(f'{name} says that the maps get other numbers of sampling points '
                                  f'than decoder_n_points={points}, which RTDETR does not have')
    return {name: tensor for name, tensor in state_dict.items() if name not in scales}


def _check_config(config: Mapping) -> None:
    kinds = dict(rt_detr=_FIXED, rt_detr_v2=_FIXED | _FIXED_V2)
    if config.get('model_type') not in kinds:
        raise CheckpointError(f'config.json says model_type={config.get("model_type")!r}; this '
                              f'converts {" and ".join(kinds)}')
    wrong = [f'{name}={config[name]!r}' for name in _COUNTS
             if name in config and not (type(config[name]) is int and config[name] >= 0)]
    if wrong:
        raise CheckpointError('config.json gives no number where one belongs:', *wrong)
    given = _flat(config)
    # transformers takes either.
    features, indices = (f'backbone_config.out_{kind}' for kind in ('features', 'indices'))
    if not given.get(features) and given.get(indices):
        given[features] = [f'stage{index}' for index in given[indices]]
    wanted = dict(kinds[config['model_type']], backbone_config=_FIXED_BACKBONE)
    _compare(given, _flat(wanted), 'RTDETR has no equal of this model, for its config says',
             ' (only {!r})')


def _flat(config: Mapping) -> dict:
    """The config, what it says of the backbone by names such as 'backbone_config.depths'."""
    backbone = config.get('backbone_config') or {}
    return ({name: value for name, value in config.items() if name != 'backbone_config'}
            | {f'backbone_config.{name}': value for name, value in backbone.items()})


def _compare(given: Mapping, wanted: Mapping, problem: str, remark: str) -> None:
    """Insist that what is given of what is wanted is that."""
    wrong = [f'{name}={given[name]!r}' + remark.format(value) for name, value in wanted.items()
             if name in given and given[name] != value]
    if wrong:
        raise CheckpointError(f'{problem}:', *wrong)


def _read_classes(config: Mapping, num_classes: int) -> list[str] | None:
    labels = config.get('id2label')
    if labels is None:
        return None
    try:
        labels = {int(index): str(label) for index, label in labels.items()}
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f'config.json has an id2label that is none: {error}') from error
    if sorted(labels) != list(range(num_classes)):
        raise CheckpointError(f'config.json names {len(labels)} classes in id2label, but the '
                              f'weights have {num_classes} (numbered from 0)')
    classes = [labels[index] for index in range(num_classes)]
    return None if classes == [f'LABEL_{index}' for index in range(num_classes)] else classes


def _hidden_sizes(settings: Mapping) -> list[int]:
    expansion = 4 if settings['backbone']['depth'] >= 50 else 1
    return [64 * expansion * 2**stage for stage in range(4)]


def _graph_config(settings: Mapping) -> dict:
    """What a config.json says of the model's graph."""
    neck, decoder = settings['neck'], settings['decoder']
    depth = settings['backbone']['depth']
    depths = {18: [2, 2, 2, 2], 101: [3, 4, 23, 3]}.get(depth, [3, 4, 6, 3])
    noise = settings.get('dn_cfg') or {}
    return dict(
        **_FIXED,
        backbone_config=dict(
            **_FIXED_BACKBONE, layer_type='bottleneck' if depth >= 50 else 'basic', depths=depths,
            hidden_sizes=_hidden_sizes(settings), out_indices=[2, 3, 4]),
        freeze_backbone_batch_norms=is_frozen(settings),
        feat_strides=[8, 16, 32],
        encoder_in_channels=list(neck['in_channels']), encoder_hidden_dim=neck['embed_dims'],
        encoder_ffn_dim=neck['ffn_dims'], encoder_attention_heads=neck['num_heads'],
        hidden_expansion=neck['expansion'],
        d_model=decoder['embed_dims'], decoder_in_channels=list(decoder['in_channels']),
        decoder_layers=decoder['num_layers'], decoder_ffn_dim=decoder['ffn_dims'],
        decoder_attention_heads=decoder['num_heads'], decoder_n_points=decoder['num_points'],
        num_queries=settings.get('num_queries', 300),
        # Without denoising transformers' model has no table for the labels.
        num_denoising=noise.get('num_queries') or 100,
        label_noise_ratio=noise.get('label_noise', 0.5),
        box_noise_scale=noise.get('box_noise', 1.0))
