"""mmdet's inferencer, which knows the models of this package, too."""
from mmdet.apis import DetInferencer as MMDetInferencer
from mmengine.config import Config

from ..zoo import UnknownModelError, get_config


class DetInferencer(MMDetInferencer):
    """mmdet's DetInferencer, whose `model` may also be a name of :func:`spartan_mm.list_models`.

    NOTE mmdet's own looks names up in the files of mmdet alone. There are no weights to go with
    these names: give `weights`, or they are random.

    Examples:
        >>> inferencer = DetInferencer('rtdetr_spartan_xt_digits', device='cpu')  # doctest: +SKIP
        >>> inferencer('photo.jpg', out_dir='outputs')  # doctest: +SKIP
    """

    def _load_model_from_metafile(self, model: str) -> tuple[Config, str | None]:
        """Find the config, and if there are any, the weights."""
        try:
            return get_config(model), None
        except UnknownModelError as error:
            try:
                return super()._load_model_from_metafile(model)
            except ValueError:
                raise UnknownModelError(f'{error} mmdet has none of this name, either') from None
