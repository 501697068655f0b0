"""A small classification dataset made on the spot: handwritten digits, a folder for each class.

The pictures are scikit-learn's samples as they are, 8x8 pixels; nothing is downloaded. The split is
that of the detection dataset (:mod:`spartan_mm.datasets.digits`): with the same seed, a classifier
trained on these has seen no digit that a detector is validated on.
"""

import json
from pathlib import Path

import cv2

from .atomic_folder import make_once
from .digits import share_out_digits

# Goes into the stamp: raise it whenever the pictures change for the same arguments.
_VERSION = 1
_DESCRIPTION = 'handwritten digits, a folder for each class'
_INFO = 'info.json'


def make_digit_folder(root: str | Path, seed: int = 0) -> Path:
    """Make the dataset under ``root``, unless it is there already, made with the same seed.

    There are ``train/<class>/<sample>.png`` and ``val/<class>/<sample>.png``, the classes named
    0 to 9 and the samples by their index in scikit-learn's set; and ``info.json``.

    Args:
        root: Folder to make. One made here earlier with another seed is replaced.
        seed: Of what is held out for validation, a fifth of each class.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: ``root`` is there and holds something else.
        ImportError: Scikit-learn is missing.
    """
    stamp = dict(version=_VERSION, seed=seed)

    def write(folder: Path) -> None:
        samples, indices = share_out_digits(seed)
        for split, classes in indices.items():
            for label, of_class in enumerate(classes):
                target = folder / split / str(label)
                target.mkdir(parents=True)
                for index in of_class:
                    picture = (255 * samples[index]).round().astype('uint8')
                    _, content = cv2.imencode('.png', picture)
                    (target / f'{index:04d}.png').write_bytes(content.tobytes())
        counts = {split: sum(map(len, classes)) for split, classes in indices.items()}
        (folder / _INFO).write_text(json.dumps(
            dict(description=_DESCRIPTION, stamp=stamp, pictures=counts)))

    return make_once(root, _DESCRIPTION, stamp, [_INFO], write)
