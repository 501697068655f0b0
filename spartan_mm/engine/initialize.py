"""Initialisation from checkpoints that other code bases published."""
from mmengine.logging import print_log
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from ..converters.common import load_checkpoint, pick_state_dict
from ..converters.rtdetr import convert_resnet_vd
from ..converters.spartan import convert_spartan_backbone
from .checkpoint import CheckpointError
from .pretrained import init_file

CONVERTERS = {
    'resnet_vd': convert_resnet_vd,
    'spartan': lambda state_dict: convert_spartan_backbone(
        {name: tensor for name, tensor in state_dict.items() if not name.startswith('linear.')})[0],
}


@WEIGHT_INITIALIZERS.register_module()
class ConvertedPretrained:
    """Loads a backbone's original checkpoint, renaming its tensors on the way.

    For `init_cfg`. Everything must fit: names, shapes, nothing missing, nothing left over. No code
    in the file is executed.

    Args:
        checkpoint: Path or URL of a file, safetensors or written by torch.
        converter: 'resnet_vd' for RT-DETR's ResNet-vd weights, 'spartan' for the authors'
            classifiers, whose linear layer is left out.

    Raises:
        ValueError: Unknown converter.
        FileNotFoundError: There is no such file.
        CheckpointError: The checkpoint cannot be downloaded, read or converted, or does not fit.
    """

    def __init__(self, checkpoint: str, converter: str):
        if converter not in CONVERTERS:
            raise ValueError(f"ConvertedPretrained: converter='{converter}' is unknown; "
                             f'choose one of {sorted(CONVERTERS)}')
        self.checkpoint = checkpoint
        self.converter = converter

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into `module`."""
        path = init_file(self.checkpoint)
        try:
            weights = pick_state_dict(load_checkpoint(path),
                                      ('ema.module', 'model', 'state_dict'))
            module.load_state_dict(CONVERTERS[self.converter](weights), strict=True)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f'checkpoint {self.checkpoint} does not fit '
                                  f'{type(module).__name__}: {error}') from error
        print_log(f'{type(module).__name__}: loaded {len(weights)} tensors of {self.checkpoint}',
                  'current')
