"""What is exported: tensors in, tensors out, with everything inside that could be got wrong."""
from mmengine.model import ImgDataPreprocessor
from torch import Tensor, nn

from ..errors import UsageError


class Normalize(nn.Module):
    """What a data preprocessor does to images, for images in RGB order.

    Args:
        preprocessor: The model's, of mmdet or mmpretrain.
    """

    def __init__(self, preprocessor: nn.Module):
        super().__init__()
        # mmpretrain says that it turns BGR into RGB, mmdet and mmengine that they turn either.
        self.flip = not getattr(preprocessor, 'to_rgb',
                                getattr(preprocessor, '_channel_conversion', False))
        normalizes = getattr(preprocessor, '_enable_normalize', False)
        for name in ('mean', 'std'):
            value = getattr(preprocessor, name) if normalizes else None
            self.register_buffer(name, None if value is None else value.float().view(1, -1, 1, 1))
        if self.mean is not None and not self.mean.any():
            self.mean = None

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) RGB, 0 to 255 of any type, to what the model takes, float32."""
        images = images.float()
        if self.flip:
            images = images.flip(1)
        if self.mean is not None:
            images = images - self.mean
        return images if self.std is None else images / self.std


class Classify(nn.Module):
    """A classifier from images to scores.

    Args:
        model: mmpretrain's ImageClassifier.
        raw: Give logits instead.
    """

    input_names = ('images', )

    def __init__(self, model: nn.Module, raw: bool = False):
        super().__init__()
        from mmpretrain.models import MultiLabelClsHead
        self.normalize = Normalize(model.data_preprocessor)
        self.model = model
        self.raw = raw
        self.multi_label = isinstance(model.head, MultiLabelClsHead)
        self.output_names = ('logits', ) if raw else ('scores', )

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) RGB, 0 to 255, to (N, classes), 0 to 1."""
        logits = self.model(self.normalize(images)).float()
        if self.raw:
            return logits
        return logits.sigmoid() if self.multi_label else logits.softmax(1)


class Detect(nn.Module):
    """A detector from images to detections, as RT-DETR's official export has them.

    NOTE: Officially boxes are not clipped to the image; here they are, as everywhere in mmdet.

    Args:
        model: A RTDETR.
        raw: Give logits and boxes of all queries instead.
    """

    def __init__(self, model: nn.Module, raw: bool = False):
        super().__init__()
        self.normalize = Normalize(model.data_preprocessor)
        self.model = model
        self.raw = raw
        self.input_names = ('images', ) if raw else ('images', 'orig_target_sizes')
        self.output_names = ('logits', 'boxes') if raw else ('labels', 'boxes', 'scores')

    def forward(self, images: Tensor, orig_target_sizes: Tensor | None = None
                ) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            images: (N, 3, H, W) RGB, 0 to 255.
            orig_target_sizes: (N, 2), width and height of the images before they were resized, in
                pixels, whole numbers; none if `raw`.

        Returns:
            Labels (N, K), boxes (N, K, 4) (x1, y1, x2, y2; pixels of the original image, clipped to
            it) and scores (N, K), best first. If `raw`, logits (N, Q, classes) and boxes (N, Q, 4)
            (cx, cy, w, h; 0 to 1).
        """
        logits, boxes = self.model.infer(self.normalize(images))
        if self.raw:
            return logits, boxes
        scores, labels, corners = self.model.bbox_head.best(logits, boxes)
        scale = orig_target_sizes.to(corners.dtype).repeat(1, 2)[:, None]  # (N, 1, 4)
        return labels, corners.clamp(0, 1) * scale, scores


def make_graph(model: nn.Module, raw: bool = False) -> Classify | Detect:
    """Wrap a model for export.

    Raises:
        UsageError: It is of a kind that has no export.
    """
    kind = type(model).__name__
    preprocessor = model.data_preprocessor
    if hasattr(model, 'infer') and hasattr(getattr(model, 'bbox_head', None), 'best'):
        graph = Detect(model, raw)
    elif kind == 'ImageClassifier' and model.with_head:
        graph = Classify(model, raw)
    else:
        raise UsageError(f'{kind} cannot be exported: classifiers (ImageClassifier) and RTDETR '
                         'can; a detector with anchors needs suppression (NMS) after its graph')
    if not isinstance(preprocessor, ImgDataPreprocessor) and not hasattr(preprocessor, 'to_rgb'):
        raise UsageError(f'{kind} cannot be exported with the data preprocessor '
                         f'{type(preprocessor).__name__}, which is neither mmdet\'s nor '
                         'mmpretrain\'s')
    return graph.eval()
