"""Small objects in large pictures: detectors that look at tiles, by sahi (arXiv 2202.06934)."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sahi.models.base import DetectionModel
from sahi.predict import get_sliced_prediction
from sahi.prediction import ObjectPrediction
from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list

from .runtime import Detections, any_size


class SahiModel(DetectionModel):
    """A detector of this package, for whatever sahi does with one.

    Args:
        model: A :class:`~spartan_mm.inference.Detector` or a :class:`~spartan_mm.runtime.Runtime`
            of one; by name, as all arguments.
        kwargs: Of sahi's `DetectionModel`, such as `confidence_threshold`.

    Example:
        >>> from spartan_mm.inference import load_model  # doctest: +SKIP
        >>> SahiModel(model=load_model('FILE.pth'), confidence_threshold=0.4)  # doctest: +SKIP
    """

    def set_model(self, model: Any, **kwargs: Any) -> None:
        self.model = model
        self.category_mapping = {str(label): name for label, name in enumerate(model.classes)}

    def perform_inference(self, image: np.ndarray) -> None:
        """Detect in an image (H, W, 3) in RGB order."""
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: Sequence[np.ndarray]) -> None:
        """Detect in some images in one pass."""
        self._original_predictions = self.model([image[..., ::-1] for image in images], len(images))

    def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: Any = ((0, 0), ), full_shape_list: Any = None) -> None:
        number = len(self._original_predictions)
        shifts = fix_shift_amount_list(shift_amount_list)
        shapes = fix_full_shape_list(full_shape_list) or [None] * number
        self._object_prediction_list_per_image = [
            [ObjectPrediction(bbox=box, category_id=int(label), category_name=found.name(label),
                              score=float(score), shift_amount=shift, full_shape=shape)
             for box, label, score in zip(found.boxes.tolist(), found.labels, found.scores,
                                          strict=True) if box[0] < box[2] and box[1] < box[3]]
            for found, shift, shape in zip(
                (each.above(self.confidence_threshold) for each in self._original_predictions),
                shifts, shapes, strict=True)]


class TiledDetector:
    """A detector that looks at overlapping tiles of an image and at the whole, and joins the boxes.

    Tiles overlap by a fifth. Boxes of one class are joined of which one is half in another.

    Args:
        model: A detector, as of :class:`SahiModel`.
        tile: Side of a tile in pixels.
        score_threshold: The least score of a detection.
    """

    task = 'detection'

    def __init__(self, model: Any, tile: int, score_threshold: float = 0.3) -> None:
        self._model = SahiModel(model=model, confidence_threshold=score_threshold)
        self.classes, self.read, self._tile = model.classes, model.read, tile
        self.files: Sequence[Path | str] = model.files

    def __call__(self, images: Sequence[Any], batch_size: int = 1) -> list[Detections]:
        """Detect in images that :meth:`read` gave, so many tiles of one in a pass."""
        return [self._detect(np.asarray(image) if isinstance(image, Image.Image)
                             else image[..., ::-1], batch_size) for image in images]

    def _detect(self, image: np.ndarray, batch_size: int) -> Detections:
        # sahi takes Pillow's limit of pixels away and does not bring it back.
        with any_size():
            found = get_sliced_prediction(
                image, self._model, self._tile, self._tile, batch_size=batch_size, verbose=0,
                force_postprocess_type=True).object_prediction_list
        return Detections(
            np.array([each.bbox.to_xyxy() for each in found], np.float32).reshape(-1, 4),
            np.array([each.category.id for each in found], int),
            np.array([each.score.value for each in found], np.float32), self.classes).best_first()
