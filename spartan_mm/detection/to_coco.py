"""Other formats of labels written as COCO's files, for tools that read nothing else."""
from pathlib import Path

from mmdet.registry import DATASETS
from mmengine.registry import DefaultScope

from ..datasets.layouts import find_data
from ..errors import UsageError
from ..files import check_writable, write_json


def write_coco(data: str | Path, out_dir: str | Path, seed: int = 0) -> dict[str, Path]:
    """Write the labels of a folder of data as COCO's files, one for each part.

    The pictures stay where they are: ``file_name`` is their path in the folder.

    Args:
        data: The folder, or its ``data.yaml``, see :func:`~spartan_mm.datasets.layouts.find_data`.
        out_dir: Where ``train.json``, ``val.json`` and, if there is a part for a test,
            ``test.json`` go.
        seed: Of the pictures that are held out for validation, where none are meant for it.

    Returns:
        The files, by 'train', 'val' and 'test'.

    Raises:
        DataError: The data is not what it should be.
        UsageError: It has no boxes, or the files would lie in its folder.
    """
    found = find_data(data, seed)
    if found.task != 'detection':
        raise UsageError(f'{data} has {found.format}, so there are no boxes to write; expected are '
                         'labels of YOLO or Pascal VOC')
    if Path(out_dir).resolve().is_relative_to(found.root.resolve()):
        raise UsageError(f'{out_dir} is in the folder of the data, {found.root}, which would then '
                         'have labels of two formats: name a folder outside with --out-dir')
    contents = {}
    for split, settings in found.splits.items():
        with DefaultScope.overwrite_default_scope('mmdet'):
            examined = DATASETS.build(dict(
                settings, data_root=str(found.root), metainfo=dict(classes=found.classes),
                test_mode=split != 'train', lazy_init=True)).examine()
        examined.raise_errors()
        prefix = Path(settings['data_prefix']['img'])
        contents[Path(out_dir, f'{split}.json')] = dict(
            images=[dict(image, file_name=(prefix / image['file_name']).as_posix())
                    for image in examined.images],
            annotations=examined.annotations, categories=examined.categories)
    for path in contents:
        check_writable(path)
    for path, content in contents.items():
        write_json(path, content)
    return {path.stem: path for path in contents}
