"""mmdet's inferencer, which knows the models of this package, and insists on weights that fit."""
from typing import Any

from mmdet.apis import DetInferencer as MMDetInferencer
from mmengine.config import Config
from torch import nn

from ..engine.class_order import Match, follow_config
from ..model_index import UnknownModelError, get_config
from ..weights.loading import fill_for_inference, find_meta


class DetInferencer(MMDetInferencer):
    """mmdet's DetInferencer, whose `model` may also be a name of :func:`spartan_mm.list_models`.

    NOTE: mmdet's own looks names up in the files of mmdet alone. There are no weights to go with
    these names: give `weights`, or they are random.

    NOTE: Of weights that do not fit, mmdet's own loads what does, be it nothing, and predicts with
    random numbers for the rest; nor does it know the deploy form.

    Args:
        model, args: As of mmdet's.
        match_classes: See :class:`spartan_mm.inference.Model`.
        kwargs: As of mmdet's.

    Raises:
        FileNotFoundError: There is no file `weights`.
        CheckpointError: It cannot be read, is of another architecture or has other classes.
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
        """Load all weights, in the form that they have; mmdet reads the names of the classes."""
        if checkpoint is not None:
            checkpoint = follow_config(model, cfg, checkpoint, str(self._weights), self._match)
            fill_for_inference(model, checkpoint, str(self._weights))
            # mmdet takes neither bare weights nor entries that are None.
            meta = {key: value for key, value in find_meta(checkpoint).items() if value is not None}
            checkpoint = dict(meta=meta, state_dict=model.state_dict())
        super()._load_weights_to_model(model, checkpoint, cfg)
