"""What the commands do: read a file or folder, convert, write, say what was found."""
from collections.abc import Mapping
from pathlib import Path

from ..engine.reading import CheckpointError, read_config
from .common import ConversionError, StateDict, load_checkpoint, pick_state_dict, save_checkpoint
from .huggingface import (
    convert_huggingface,
    export_huggingface,
    image_processor,
    read_huggingface,
    write_huggingface,
)
from .rtdetr import convert_rtdetr, export_rtdetr
from .spartan import convert_spartan, export_spartan


def convert_spartan_file(src: str, dst: str) -> str:
    """Convert a classifier of the authors into a checkpoint of ours.

    Args:
        src: Their checkpoint, .pth or .safetensors.
        dst: File to write, .pth or .safetensors.

    Returns:
        What was done.

    Raises:
        ConversionError: The checkpoint does not fit, or a file cannot be read or written.
    """
    state_dict = pick_state_dict(load_checkpoint(src), ('model', 'state_dict'))
    _refuse_ours(state_dict)
    state_dict, arch = convert_spartan(state_dict)
    return _save_ours(state_dict, dict(arch=arch), dst)


def export_spartan_file(src: str, dst: str) -> str:
    """Convert a classifier of ours into a checkpoint of the authors; see above.

    Args:
        src: Our checkpoint.
        dst: File to write: the weights are its entry 'model', where the authors' code looks.

    Returns:
        What was done.

    Raises:
        ConversionError: See :func:`convert_spartan_file`.
    """
    state_dict, arch = export_spartan(read_ours(src)[0])
    return _save_foreign(state_dict, arch, dst)


def convert_rtdetr_file(src: str, dst: str) -> str:
    """Convert an RT-DETR of the authors, or of transformers, into a checkpoint of ours.

    Args:
        src: An official checkpoint, of which the averaged weights are taken where there are any
            (`ema.module`), the trained ones (`model`) otherwise; or a folder with config.json and
            model.safetensors.
        dst: File to write, .pth or .safetensors.

    Returns:
        What was done.

    Raises:
        ConversionError: See :func:`convert_spartan_file`.
    """
    if Path(src).is_dir():
        state_dict, settings, classes = convert_huggingface(*read_huggingface(src))
        meta = dict(arch=settings)
        if classes:
            # Where mmdet's inferencers look.
            meta['dataset_meta'] = dict(classes=tuple(classes))
        return _save_ours(state_dict, meta, dst)

    state_dict = pick_state_dict(load_checkpoint(src), ('ema.module', 'model', 'state_dict'))
    if any(name.startswith('model.backbone.model.') for name in state_dict):
        raise ConversionError(f'{src} is a model of transformers; give the folder that it lies in, '
                              'with config.json')
    _refuse_ours(state_dict)
    state_dict, settings = convert_rtdetr(state_dict)
    return _save_ours(state_dict, dict(arch=settings), dst)


def export_rtdetr_file(src: str, dst: str, to: str) -> str:
    """Convert an RT-DETR of ours into a checkpoint of the authors, or a model of transformers.

    Args:
        src: Our checkpoint: trained, published or converted.
        dst: File to write, or, for transformers, the folder.
        to: 'official' (version 1) or 'huggingface'.

    Returns:
        What was done.

    Raises:
        ConversionError: See :func:`convert_spartan_file`.
    """
    state_dict, meta, config = read_ours(src)
    settings = meta.get('arch') or config.get('model') or {}
    if to == 'official':
        state_dict, settings = export_rtdetr(state_dict, settings)
        return _save_foreign(state_dict, settings, dst)

    classes = (meta.get('dataset_meta') or {}).get('classes')
    width, height = _test_scale(config)
    if width != height and not settings.get('neck', {}).get('legacy_position', False):
        raise ConversionError(
            f'the model is tested on {width} x {height} pixels: where an image is not square, '
            'transformers numbers the positions as neck.legacy_position=True does, but the model '
            'was trained without it')
    processor = image_processor(height, width, settings.get('data_preprocessor'))
    state_dict, foreign_config = export_huggingface(state_dict, settings, classes)
    write_huggingface(dst, state_dict, foreign_config, processor)
    named = 'their names from the checkpoint' if classes else 'no names in the checkpoint'
    return (f'{len(state_dict)} tensors written to {dst}, with config.json '
            f'({len(foreign_config["id2label"])} classes, {named}) and preprocessor_config.json '
            f'({width} x {height} pixels)')


def read_ours(path: str | Path) -> tuple[StateDict, dict, dict]:
    """Read a checkpoint of ours.

    Args:
        path: File written by mmengine, by the publishing command or by a converter.

    Returns:
        Tensors by name (of a training with averaging the averaged ones); `meta`; and the config.
        The latter two are empty if there are none.

    Raises:
        ConversionError: The file cannot be read or has no weights.
    """
    checkpoint = load_checkpoint(path)
    state_dict = pick_state_dict(checkpoint, ('state_dict', ))
    meta = checkpoint.get('meta') if isinstance(checkpoint.get('meta'), dict) else {}
    if meta.get('deploy'):
        raise ConversionError(f'{path} was merged for inference, which nothing undoes; convert the '
                              'checkpoint that it was made from')
    try:
        config = read_config(checkpoint, path)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    return state_dict, meta, config.to_dict() if config else {}


def _test_scale(config: Mapping) -> tuple[int, int]:
    """(width, height) that a config's test pipeline resizes images to; RT-DETR's if it has none."""
    dataset = (config.get('test_dataloader') or {}).get('dataset') or {}
    for transform in dataset.get('pipeline') or config.get('test_pipeline') or ():
        if transform.get('type', '').endswith('Resize') and 'scale' in transform:
            if transform.get('keep_ratio'):
                raise ConversionError('the model is tested with the images\' aspect ratio kept '
                                      "(keep_ratio), which transformers' image processor for "
                                      'RT-DETR does not do')
            return tuple(transform['scale'])
    return 640, 640


def _refuse_ours(state_dict: StateDict) -> None:
    """Tell who converts what is ours already that there is no need to."""
    if any(name.startswith(('backbone.stages.', 'bbox_head.', 'head.fc.')) for name in state_dict):
        raise ConversionError('it has the names of this package already; nothing is to be '
                              'converted')


def _save_ours(state_dict: StateDict, meta: dict, dst: str) -> str:
    save_checkpoint(dict(state_dict=state_dict, meta=meta), dst)
    return f'architecture: {meta["arch"]}\n{len(state_dict)} tensors written to {dst}'


def _save_foreign(state_dict: StateDict, arch: dict, dst: str) -> str:
    # A safetensors file has no entries; the official loaders read .pth files only.
    is_flat = Path(dst).suffix == '.safetensors'
    save_checkpoint(state_dict if is_flat else dict(model=state_dict), dst)
    return f'architecture: {arch}\n{len(state_dict)} tensors written to {dst}'
