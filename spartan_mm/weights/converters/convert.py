"""Converting files: what they are is told by their names, and what was done in a sentence."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import CheckpointError
from ...files import check_writable
from ..loading import find_classes, find_meta, find_state_dict
from ..safe_load import read_foreign
from ..saving import save_checkpoint
from ..stored_config import find_test_dataset, read_config
from .backbones import ORIGINALS, convert_backbone, export_backbone
from .huggingface import (
    HUGGINGFACE_FILES,
    convert_huggingface,
    export_huggingface,
    image_processor,
    read_huggingface,
    write_huggingface,
)
from .names import StateDict
from .rtdetr import convert_rtdetr, export_rtdetr
from .spartan import convert_spartan, export_spartan

#: Who reads a file of each kind.
KINDS = {
    'mm': 'this package',
    'spartan': "the authors' code of SpaRTAN, a classifier",
    'official': 'the official code of RT-DETR, D-FINE or DEIM',
    'huggingface': 'transformers, a folder of RTDetrForObjectDetection',
} | {name: f"the authors' code of {original.backbone.__name__}, a classifier"
     for name, original in ORIGINALS.items()}

# Where the weights lie in files of each kind, in order of preference.
_ENTRIES = {
    'mm': ('state_dict', ),
    'spartan': ('model', 'state_dict'),
    'official': ('ema.module', 'model', 'state_dict'),
} | dict.fromkeys(ORIGINALS, ('model_ema', 'model', 'state_dict'))

# What names of tensors begin with in each kind, some of them.
_BEGINNINGS = {
    'mm': ('backbone.stages.', 'bbox_head.', 'head.fc.'),
    'huggingface': ('model.backbone.model.', ),
    'spartan': ('conv.', 'layers.', 'linear.'),
    'official': ('backbone.', 'encoder.', 'decoder.'),
    'moganet': ('patch_embed1.projection.', ),
    'unireplknet': ('downsample_layers.', ),
    'casvit': ('network.0.0.local_perception.', ),
    'lsnet': ('patch_embed.0.c.', ),
    'affnet': ('conv_1.block.', ),
}

NOTHING_TO_DO = 'it has the names of this package already; nothing is to be converted'


class Source(NamedTuple):
    """What is to be converted.

    Attributes:
        path: Where it was read from.
        kind: One of KINDS.
        weights: Tensors by name; of a training with averaging the averaged ones.
        checkpoint: The whole content; of transformers' folder what its config.json says.
    """

    path: Path
    kind: str
    weights: StateDict
    checkpoint: Any


def read_source(path: str | Path, kind: str | None = None) -> Source:
    """Read what is to be converted.

    Args:
        path: A file, .pth or .safetensors, or a folder of transformers.
        kind: One of KINDS; None to tell it by the names of the tensors.

    Raises:
        CheckpointError: It cannot be read, or is of no kind that is known.
    """
    path = Path(path)
    if path.is_dir() or kind == 'huggingface':
        return Source(path, 'huggingface', *read_huggingface(path))
    checkpoint = read_foreign(path)
    # What a training was distilled with is no part of the model.
    weights = {name: tensor for name, tensor in find_state_dict(
        checkpoint, path, _ENTRIES[kind or 'official']).items()
        if not name.startswith('distillation.')}
    found = next((known for known, beginnings in _BEGINNINGS.items()
                  if any(name.startswith(beginnings) for name in weights)), None)
    # D-FINE's official backbone has stages, too, as ours have; its neck is no neck.
    if found == 'mm' and any(name.startswith('encoder.') for name in weights):
        found = 'official'
    if found == 'huggingface':
        raise CheckpointError(f'{path} is a model of transformers; give the folder that it lies '
                              'in, with config.json')
    if found == 'mm' and kind not in (None, 'mm'):
        raise CheckpointError(NOTHING_TO_DO)
    if kind is None and found is None:
        raise CheckpointError('it is no checkpoint of this package, of the authors of SpaRTAN, of '
                              'the official codes of RT-DETR, D-FINE and DEIM, or of '
                              f'transformers, nor a known backbone ({", ".join(ORIGINALS)}); its '
                              f'tensors are {", ".join([*weights][:5])} ...')
    return Source(path, kind or found, weights, checkpoint)


def convert(source: Source, dst: str | Path, to: str) -> str:
    """Write a checkpoint for others who read it.

    Args:
        source: What :func:`read_source` read.
        dst: File to write, .pth or .safetensors; for transformers the folder.
        to: One of KINDS; to or from an RT-DETR of others, ``spartan_mm.detection`` has to be
            imported.

    Returns:
        What was done.

    Raises:
        CheckpointError: The checkpoint does not fit, or has no place on the other side.
        UnwritableError: A file cannot be written, or is one that was read.
    """
    if (source.kind == 'mm') == (to == 'mm'):
        if to == 'mm':
            raise CheckpointError(NOTHING_TO_DO)
        raise CheckpointError(f'it is read by {KINDS[source.kind]}: convert it to mm first, and '
                              f'that to {to}')
    for name in HUGGINGFACE_FILES if to == 'huggingface' else ('', ):
        check_writable(Path(dst, name), source.path, *source.path.glob('*'))
    return _to_ours(source, dst) if to == 'mm' else _from_ours(source, dst, to)


def _to_ours(source: Source, dst: str | Path) -> str:
    classes, deploy = None, False
    if source.kind == 'huggingface':
        weights, arch, classes = convert_huggingface(source.weights, source.checkpoint)
    elif source.kind in ORIGINALS:
        weights, arch, deploy = convert_backbone(source.kind, source.weights)
    else:
        convert = convert_spartan if source.kind == 'spartan' else convert_rtdetr
        weights, arch = convert(source.weights)
    meta = dict(arch=arch) | (dict(deploy=True) if deploy else {})
    if classes:
        # Where mmdet's inferencers look.
        meta['dataset_meta'] = dict(classes=tuple(classes))
    save_checkpoint(dict(state_dict=weights, meta=meta), dst)
    return f'architecture: {arch}\n{len(weights)} tensors written to {dst}'


def _from_ours(source: Source, dst: str | Path, to: str) -> str:
    meta = find_meta(source.checkpoint)
    deploy = bool(meta.get('deploy'))
    if deploy and to != 'unireplknet':  # whose authors have such a form, too
        raise CheckpointError(f'{source.path} was merged for inference, which nothing undoes; '
                              'convert the checkpoint that it was made from')
    config = read_config(source.checkpoint, source.path) or {}
    settings = meta.get('arch') or config.get('model') or {}
    if to == 'huggingface':
        return _to_huggingface(source.weights, settings, find_classes(source.checkpoint), config,
                               dst)
    if to in ORIGINALS:
        weights, arch = export_backbone(to, source.weights, deploy)
    elif to == 'spartan':
        weights, arch = export_spartan(source.weights)
    else:
        weights, arch = export_rtdetr(source.weights, settings)
    # A safetensors file has no entries; the official loaders read .pth files only.
    is_flat = Path(dst).suffix == '.safetensors'
    save_checkpoint(weights if is_flat else dict(model=weights), dst)
    return f'architecture: {arch}\n{len(weights)} tensors written to {dst}'


def _to_huggingface(weights: StateDict, settings: Mapping, classes: Sequence[str] | None,
                    config: Mapping, dst: str | Path) -> str:
    width, height = _test_scale(config)
    if width != height and not settings.get('neck', {}).get('legacy_position', False):
        raise CheckpointError(
            f'the model is tested on {width} x {height} pixels: where an image is not square, '
            'transformers numbers the positions as neck.legacy_position=True does, but the model '
            'was trained without it')
    processor = image_processor(height, width, settings.get('data_preprocessor'))
    weights, foreign_config = export_huggingface(weights, settings, classes)
    write_huggingface(dst, weights, foreign_config, processor)
    named = 'their names from the checkpoint' if classes else 'no names in the checkpoint'
    return (f'{len(weights)} tensors written to {dst}, with config.json '
            f'({len(foreign_config["id2label"])} classes, {named}) and preprocessor_config.json '
            f'({width} x {height} pixels)')


def _test_scale(config: Mapping) -> tuple[int, int]:
    """(width, height) that a config's test pipeline resizes images to; RT-DETR's if it has none."""
    dataset = find_test_dataset(config)
    for transform in dataset.get('pipeline') or config.get('test_pipeline') or ():
        if transform.get('type', '').endswith('Resize') and 'scale' in transform:
            if transform.get('keep_ratio'):
                raise CheckpointError('the model is tested with the images\' aspect ratio kept '
                                      "(keep_ratio), which transformers' image processor for "
                                      'RT-DETR does not do')
            return tuple(transform['scale'])
    return 640, 640
