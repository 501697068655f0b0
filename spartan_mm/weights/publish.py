"""Files to give away: weights, class names and config, and nothing else of the training."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import mmengine
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import check_writable, write_whole
from ..version import __version__
from .config_text import CodeError, read_text
from .forms import is_deployed
from .initialize import without_training
from .loading import fill_for_inference, find_classes, find_meta, find_state_dict
from .safe_load import local_file, read_checkpoint, with_tuples
from .saving import write_checkpoint
from .stored_config import (
    as_text,
    find_test_dataset,
    from_plain,
    make_config,
    read_config,
    to_plain,
)

# What a config imports to know the parts of this package, by its default scope.
_IMPORTS = {'mmdet': 'spartan_mm.detection', 'mmpretrain': 'spartan_mm.classification'}

# What belongs to one run on one machine.
_OF_THE_RUN = ('work_dir', 'load_from', 'resume', 'launcher', 'local_rank', 'gpu_ids', 'device',
               'vis_backends')

_NO_TEXT = ('the config holds what cannot be written as plain text, such as a function; give its '
            'name in its place')


class Published(NamedTuple):
    """The files that were written; they say the same.

    Attributes:
        safetensors: Holds no code whatever reads it.
        pth: For programs that read ``torch.save`` alone; it has the config as text, too.
    """

    safetensors: Path
    pth: Path


def publish(source: nn.Module | str | Path, stem: str | Path,
            cfg: Config | None = None,
            classes: Sequence[str] | str | None = None) -> Published:
    """Write a model to files that inference needs nothing besides.

    Kept are the weights that the model is evaluated with (the averaged ones of a training with a
    moving average), the names and colours of the classes, and the config, without the places on
    this machine and without pretrained files. The same model gives the same bytes.

    Args:
        source: A model, or a checkpoint: a path or a URL.
        stem: What the files are called before ``-<hash>.safetensors`` and ``-<hash>.pth``; the hash
            is the first 8 digits of the file's SHA-256.
        cfg: The config; None for the one that a checkpoint of a training holds, or that
            ``get_model`` left in the model.
        classes: Names of the classes, or 'coco'; None for those in the checkpoint, else in the
            config.

    Returns:
        The files.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        CheckpointError: It cannot be read or does not fit the config, or the config or the names of
            the classes are missing.
        OSError: The files cannot be written.
    """
    if isinstance(source, nn.Module):
        checkpoint = _checkpoint_of(source)
        cfg = cfg or getattr(source, 'cfg', None) or getattr(source, '_config', None)
        source = type(source).__name__
    else:
        checkpoint = read_checkpoint(local_file(source))
    config = read_config(checkpoint, str(source)) if cfg is None else cfg
    if config is None:
        raise CheckpointError('the checkpoint holds no config: name the one it was trained with')
    plain, portable = _make_portable(config)

    found = find_state_dict(checkpoint, str(source))
    weights = {name: found[name].detach().cpu().contiguous().clone() for name in sorted(found)
               if not name.startswith('distillation.')}
    meta = find_meta(checkpoint)
    kept = dict(dataset_meta=_dataset_meta(checkpoint, config, classes), config=plain,
                spartan_mm_version=meta.get('spartan_mm_version', __version__),
                mmengine_version=meta.get('mmengine_version', mmengine.__version__))
    kept |= {key: meta[key] for key in ('epoch', 'iter', 'deploy') if key in meta}

    with DefaultScope.overwrite_default_scope(config.get('default_scope')):
        model = MODELS.build(portable.model)
    fill_for_inference(model, dict(meta=kept, state_dict=weights), str(source))
    _check_class_count(model, kept['dataset_meta']['classes'])

    # mmdet's own inferencer knows configs of text alone.
    return Published(*(_write(stem, suffix, weights, meta, source) for suffix, meta in (
        ('.safetensors', kept), ('.pth', dict(kept, cfg=as_text(from_plain(plain)))))))


def _checkpoint_of(model: nn.Module) -> dict[str, Any]:
    """Put a model into the terms of a checkpoint."""
    dataset_meta = getattr(model, 'dataset_meta', None) or getattr(model, '_dataset_meta', None)
    meta = dict(dataset_meta=dataset_meta or {})
    if is_deployed(model):
        meta['deploy'] = True
    return dict(meta=meta, state_dict=model.state_dict())


def _make_portable(config: Config) -> tuple[dict[str, Any], Config]:
    """Make a config that works elsewhere: as JSON has it, and read back from that."""
    content = {key: _without_places(value) for key, value in config.to_dict().items()
               if key not in _OF_THE_RUN}
    content['model'] = without_training(content['model'])
    if content.get('visualizer'):
        content['visualizer'] = dict(content['visualizer'],
                                     vis_backends=[dict(type='LocalVisBackend')])
    imports = dict(content.get('custom_imports') or {})
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    needed = _IMPORTS.get(config.get('default_scope'), 'spartan_mm')
    content['custom_imports'] = dict(imports, imports=names if needed in names
                                     else [*names, needed])

    try:
        # The order of keys in the file shows in its hash.
        plain = json.loads(json.dumps(to_plain(content), sort_keys=True))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f'{_NO_TEXT}: {error}') from error
    portable = make_config(from_plain(plain))
    try:
        read_text(as_text(content))
    except CodeError as error:
        raise CheckpointError(f'the config holds what is refused in a file of somebody else '
                              f'({error}): use registered names and plain values') from None
    return plain, portable


def _without_places(value: Any) -> Any:
    """Keep the last part alone of paths that begin at the root of this machine."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_places(item) for item in value)
    if not isinstance(value, str):
        return value
    path = value.removeprefix('file://')
    kind = PureWindowsPath if PureWindowsPath(path).drive else PurePosixPath
    absolute = kind(path).is_absolute() or path.startswith('~')
    if not absolute or not kind(path).name:
        return value
    return kind(path).name + ('/' if path.endswith(('/', '\\')) else '')


def _dataset_meta(checkpoint: Any, config: Config,
                  classes: Sequence[str] | str | None) -> dict[str, Any]:
    """Find names and colours of the classes."""
    if classes == 'coco':
        from mmdet.datasets import CocoDataset
        found = CocoDataset.METAINFO
    elif classes is not None:
        found = dict(classes=[classes] if isinstance(classes, str) else classes)
    else:
        found = dict(find_meta(checkpoint).get('dataset_meta') or {},
                     classes=find_classes(checkpoint))
    dataset = find_test_dataset(config)
    with DefaultScope.overwrite_default_scope(config.get('default_scope')):
        kind = DATASETS.get(dataset['type']) if 'type' in dataset else None
    for described in (dataset.get('metainfo') or {}, getattr(kind, 'METAINFO', {})):
        if not found.get('classes'):
            found = dict(found, **described)
    if not found.get('classes'):
        raise CheckpointError('neither the checkpoint nor the config names the classes: name them, '
                              "or give 'coco'")
    names = [str(name) for name in found['classes']]
    palette = found.get('palette')
    if palette is None:
        return dict(classes=names)
    return dict(classes=names,
                palette=palette if isinstance(palette, str) else np.asarray(palette).tolist())


def _check_class_count(model: nn.Module, names: Sequence[str]) -> None:
    """Insist that there is a name for each class that the model's head tells apart."""
    head = getattr(model, 'bbox_head', None) or getattr(model, 'head', None)
    count = getattr(head, 'num_classes', len(names))
    if count != len(names):
        raise CheckpointError(f'{len(names)} classes are named, but the model has {count}')


def _write(stem: str | Path, suffix: str, weights: dict[str, Tensor], meta: dict[str, Any],
           source: nn.Module | str | Path) -> Path:
    """Write a file, read it, and insist on every bit."""
    meta = with_tuples(json.loads(json.dumps(meta, sort_keys=True)))
    # Into memory: in a file torch notes down the file's name.
    content = io.BytesIO()
    write_checkpoint(dict(meta=meta, state_dict=weights), content, suffix)
    stem = Path(stem)
    digest = hashlib.sha256(content.getbuffer()).hexdigest()[:8]
    path = stem.with_name(f'{stem.name}-{digest}{suffix}')
    check_writable(path, *(() if isinstance(source, nn.Module) else (source, )))
    with write_whole(path) as file:
        file.write(content.getbuffer())

    found = read_checkpoint(path)
    same = found['meta'] == meta \
        and found['state_dict'].keys() == weights.keys() \
        and all(_bits(found['state_dict'][name]) == _bits(value)
                for name, value in weights.items())
    if not same:
        path.unlink()
        raise OSError(f'{path} could not be read back as it was written: is the disk sound?')
    return path


def _bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()
