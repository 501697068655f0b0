"""One set of pictures for training and validation: which of them are for which."""
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from .data_errors import DataError, show

#: ``name``, 'train' or 'val'; ``share`` of the pictures that are for validation; ``seed``.
Part = Mapping[str, Any] | None


def check_part(part: Part) -> None:
    """Insist that a part is named as :func:`choose_part` takes it.

    Raises:
        DataError: It is not.
    """
    if part is not None and not (
            isinstance(part, Mapping) and {*part} == {'name', 'share', 'seed'}
            and part['name'] in ('train', 'val') and isinstance(part['seed'], int)
            and isinstance(part['share'], float) and 0 < part['share'] < 1):
        raise DataError(f"part is {show(part)}, but must be a dict such as part=dict(name='val', "
                        "share=0.2, seed=0), or name='train'")


def choose_part(names: Sequence[str], part: Part) -> list[int]:
    """Choose the pictures of a part; of a set and a seed, always the same, and each in one part.

    The choice goes by the names without what they end in, whatever the order, so that a set in
    several formats is shared out alike. Both parts have a picture.

    Args:
        names: Of all pictures.
        part: Which; None for all.

    Returns:
        Their indices.

    Raises:
        DataError: There is but one picture.

    Example:
        >>> names = ['a.jpg', 'b.jpg', 'c.jpg', 'd.jpg']
        >>> [choose_part(names, dict(name=name, share=0.25, seed=0)) for name in ('train', 'val')]
        [[0, 2, 3], [1]]
    """
    if part is None:
        return [*range(len(names))]

    def draw(index: int) -> str:
        stem = PurePosixPath(names[index]).with_suffix('')
        return hashlib.sha256(f'{part["seed"]} {stem}'.encode('utf-8', 'surrogateescape')
                              ).hexdigest()

    if len(names) < 2:
        raise DataError('there is but one picture, and at least two are needed: one to train on, '
                        'one to validate on')
    drawn = sorted(range(len(names)), key=draw)
    held_out = max(1, min(len(names) - 1, round(part['share'] * len(names))))
    return sorted(drawn[:held_out] if part['name'] == 'val' else drawn[held_out:])


def take_part(content: Any, part: Part, name: str) -> Any:
    """Take a part of the images of a COCO file, called so, with their annotations.

    What is no such file is left as it is, for :class:`.CocoFile` to say so.

    Raises:
        DataError: It has but one image.
    """
    if part is None:
        return content
    try:
        names = [image['file_name'] for image in content['images']]
        kept = [content['images'][index] for index in choose_part(names, part)]
        left_out = {image['id'] for image in content['images']} - {image['id'] for image in kept}
        annotations = [item for item in content.get('annotations', [])
                       if item['image_id'] not in left_out]
    except DataError as error:
        raise DataError(f'{name}: {error}') from None
    except (AttributeError, KeyError, TypeError):
        return content
    return dict(content, images=kept, annotations=annotations)
