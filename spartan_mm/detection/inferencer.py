"""mmdet's inferencer, which knows the models of this package, and insists on weights that fit."""
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.apis import DetInferencer as MMDetInferencer
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.logging import print_log
from torch import nn

from ..datasets.classes import find_heads, find_names
from ..datasets.images import decoding_of, list_images, take_image
from ..engine.class_order import Match, follow_config
from ..errors import InputError
from ..files import check_writable
from ..model_index import UnknownModelError, get_config
from ..weights.loading import fill_for_inference, find_classes, find_meta
from ..weights.stored_config import find_test_dataset


class DetInferencer(MMDetInferencer):
    """mmdet's DetInferencer, whose `model` may also be a name of :func:`spartan_mm.list_models`.

    NOTE: mmdet's own looks names up in the files of mmdet alone. There are no weights to go with
    these names: give `weights`, or they are random.

    NOTE: Of weights that do not fit, mmdet's own loads what does, be it nothing, and predicts with
    random numbers for the rest; nor does it know the deploy form.

    It takes what :func:`take_image` does, one or many, and folders. What cannot be read of a folder
    is left out, with a warning, and stands under 'failures' in the result.

    Args:
        model, args: As of mmdet's.
        match_classes: See :class:`spartan_mm.inference.Model`.
        kwargs: As of mmdet's.

    Raises:
        FileNotFoundError: There is no file `weights`.
        CheckpointError: It cannot be read, is of another architecture, has other classes, or names
            more or fewer than the model has.
        InputError: What it is called with is no image.
        UnwritableError: `out_dir` is no folder, or a picture would replace what it is made of.
        UnknownModelError: Neither this package nor mmdet has a model of this name.

    Examples:
        >>> inferencer = DetInferencer('rtdetr_spartan_xt_digits', device='cpu')  # doctest: +SKIP
        >>> inferencer('photo.jpg', out_dir='outputs')  # doctest: +SKIP
    """

    def __init__(self, model: Any = None, *args: Any, match_classes: Match = None,
                 **kwargs: Any) -> None:
        # A checkpoint's own config is no second opinion.
        self._match = 'number' if model is None else match_classes
        super().__init__(model, *args, **kwargs)

    def __call__(self, inputs: Any, *args: Any, out_dir: str | os.PathLike = '', **kwargs: Any
                 ) -> dict[str, Any]:
        """Detect, as mmdet's own."""
        self.failures: dict[str, str] = {}
        self._pictures = Path(out_dir, 'vis') if out_dir else None
        if out_dir:
            for folder in ('vis', 'preds'):
                check_writable(Path(out_dir, folder, 'any'))
        results = super().__call__(inputs, *args, out_dir=str(out_dir), **kwargs)
        return dict(results, failures=self.failures) if self.failures else results

    def _load_model_from_metafile(self, model: str) -> tuple[Config, str | None]:
        """Find the config, and if there are any, the weights."""
        try:
            return get_config(model), None
        except UnknownModelError as error:
            try:
                return super()._load_model_from_metafile(model)
            except ValueError:
                raise UnknownModelError(f'{error} mmdet has none of this name, either') from None

    def _init_model(self, cfg: Config | None, weights: str | None,
                    device: str = 'cpu') -> nn.Module:
        """Build the model, and keep the name of its weights for error messages."""
        self._weights = weights
        return super()._init_model(cfg, weights, device)

    def _load_weights_to_model(self, model: nn.Module, checkpoint: dict[str, Any] | None,
                               cfg: Config | None) -> None:
        """Load all weights, in the form that they have, and find the names of the classes."""
        if checkpoint is not None:
            checkpoint = follow_config(model, cfg, checkpoint, str(self._weights), self._match)
            fill_for_inference(model, checkpoint, str(self._weights))
            names = find_names(model, find_classes(checkpoint), find_test_dataset(cfg),
                               str(self._weights))
            # mmdet takes COCO's where there are none.
            count = max((head.num_classes for head in find_heads(model)), default=0)
            meta = dict(find_meta(checkpoint).get('dataset_meta') or {},
                        classes=names or tuple(f'class {label}' for label in range(count)))
            checkpoint = dict(meta=dict(dataset_meta=meta), state_dict=model.state_dict())
        super()._load_weights_to_model(model, checkpoint, cfg)

    def _init_pipeline(self, cfg: Config) -> Compose:
        """Build the test pipeline, with a loader that takes all that `take_image` does."""
        loader, *steps = find_test_dataset(cfg).pipeline
        # mmdet knows no ids here.
        keys = [key for key in steps[-1].get('meta_keys', ()) if key != 'img_id']
        steps[-1] = dict(steps[-1], **(dict(meta_keys=keys) if keys else {}))
        decoding = decoding_of(loader)

        def load(value: Any) -> dict[str, Any]:
            # A dict comes with a text.
            given = dict(value) if isinstance(value, dict) else {}
            source = given.get('img', given.get('img_path', None if given else value))
            image = take_image(source, **decoding)
            size = image.shape[:2]
            image = image.astype(np.float32) if loader.get('to_float32', False) else image
            return dict(given, img=image, img_shape=size, ori_shape=size,
                        img_path=source if isinstance(source, str) else None)

        return Compose([load, *steps])

    def _inputs_to_list(self, inputs: Any) -> list[str | np.ndarray]:
        """List files by their names, and other images as arrays."""
        folder = isinstance(inputs, str | os.PathLike) and os.path.isdir(inputs)
        inputs = super()._inputs_to_list(str(inputs)) if folder else list_images(inputs)
        self._from_folder = folder
        if folder and not inputs:
            raise InputError('the folder holds no images')
        files = [Path(value) for value in inputs if isinstance(value, str | os.PathLike)]
        stems = Counter(file.stem for file in files)
        self._shared = {stem for stem, number in stems.items() if number > 1}
        for file in files if self._pictures else ():
            check_writable(self._pictures / file.name, file)
            if other := [each for each in files if each.name == file.name and each != file
                         ] if file.stem in self._shared else None:
                raise InputError(f'{file} and {other[0]} would have the same results in '
                                 f'{self._pictures.parent}: give them in two calls')
        return [str(value) if isinstance(value, str | os.PathLike) else take_image(value)
                for value in inputs]

    def pred2dict(self, data_sample: Any, pred_out_dir: str = '') -> dict[str, Any]:
        """Describe predictions, as mmdet's own, and write them.

        NOTE: mmdet's own writes those of a.jpg and a.png into one a.json; here they are a.jpg.json
        and a.png.json.
        """
        path = data_sample.get('img_path') or ''
        if Path(path).stem in self._shared:
            data_sample = data_sample.clone()
            data_sample.set_metainfo(dict(img_path=f'{path}.'))
        return super().pred2dict(data_sample, pred_out_dir)

    def _get_chunk_data(self, inputs: Iterable[Any], chunk_size: int
                        ) -> Iterator[list[tuple[Any, Any]]]:
        """Prepare images, so many at a time; leave out what cannot be read of a folder."""
        chunk = []
        for value in inputs:
            source = value.get('img', value.get('img_path')) if isinstance(value, dict) else value
            try:
                chunk.append((source, self.pipeline(value)))
            except InputError as error:
                if not self._from_folder:
                    raise
                self.failures[source] = str(error)
                print_log(f'{error}; it is left out', 'current', logging.WARNING)
            if len(chunk) == chunk_size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
