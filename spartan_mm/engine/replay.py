"""What is kept of a batch with a NaN or infinite loss or gradient, and how to run it once more."""
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UsageError
from ..files import write_whole
from ..model_index import find_config
from ..weights.loading import load_all_weights
from ..weights.safe_load import read_checkpoint
from .random_state import set_random_state

_FORMAT = 2

# The types that may be made from a file, and where they come from.
_TYPES = {'InstanceData': 'mmengine.structures', 'LabelData': 'mmengine.structures',
          'PixelData': 'mmengine.structures', 'BaseDataElement': 'mmengine.structures',
          'DetDataSample': 'mmdet.structures', 'DataSample': 'mmpretrain.structures',
          'HorizontalBoxes': 'mmdet.structures.bbox'}


@dataclass
class Replay:
    """What a batch did this time."""

    # What the dump says of that time: iteration, images, terms ...
    about: dict[str, Any]
    # Of each pass, the values of what the model's loss returned.
    terms: list[dict[str, float]] = field(default_factory=list)
    # The modules, one a pass at most, that first made a NaN or infinite output of finite inputs.
    first_broken: list[str] = field(default_factory=list)
    # The parameters whose gradient is not finite.
    broken_gradients: list[str] = field(default_factory=list)

    def differences(self) -> list[str]:
        """Names of the terms whose values are not those of the dump."""
        return sorted({name for one, now in zip(self.about['passes'], self.terms, strict=True)
                       for name, value in one['terms'].items()
                       if not torch.isclose(torch.tensor(value), torch.tensor(now[name]),
                                            rtol=1e-4, equal_nan=True)})


def replay(config: str, path: str | Path, device: str | None = None) -> Replay:
    """Run the batches of a dump through the model, forwards and backwards.

    Weights, images and random numbers are those of the training, so the same device gives the same
    terms; another kind of device draws other random numbers.

    Args:
        config: The config of the training, a file or the name of a model.
        path: What :class:`FiniteNumbersHook` has written.
        device: Such as 'cpu' or 'cuda:0'; None for the kind that the training ran on, if there is
            one.

    Raises:
        FileNotFoundError: The config or the dump does not exist.
        UsageError: The file is not a dump.
        CheckpointError: The weights in it are not those of the config's model.
    """
    cfg = Config.fromfile(find_config(config))
    about, weights, batches, states = read_dump(path)
    if device is None:
        device = get_device() if about['device'] != 'cpu' else 'cpu'

    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'):
        model = MODELS.build(cfg.model)
    load_all_weights(model, dict(state_dict=weights), str(path))
    model.to(device).train()

    result = Replay(about)
    dtype = about['autocast'] and getattr(torch, about['autocast'])
    for batch, state in zip(batches, states, strict=True):
        set_random_state(state)
        context = torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()
        with _watch(model) as broken, context:
            losses = model(**model.data_preprocessor.cast_data(batch), mode='loss')
        loss, terms = model.parse_losses(losses)
        result.terms.append({name: float(term) for name, term in terms.items() if name != 'loss'})
        result.first_broken += broken[:1]
        loss.backward()
    result.broken_gradients = [name for name, parameter in model.named_parameters()
                               if parameter.grad is not None
                               and not parameter.grad.isfinite().all()]
    return result


def write_dump(path: str | Path, about: dict[str, Any], weights: dict[str, Tensor],
               batches: list[Any], states: list[dict[str, Any]]) -> None:
    """Write what :func:`replay` needs, as tensors and text, which can be read without running code.

    Args:
        path: The file.
        about: What to say of that time, to be written as JSON.
        weights: State dict of the model.
        batches: Of each pass, what the model's forward was called with.
        states: Of each pass, the states of the random number generators before it.

    Raises:
        UnwritableError: The file cannot be written.
    """
    memory = io.BytesIO()
    torch.save(dict(about=json.dumps(dict(about, format=_FORMAT)), weights=weights,
                    batches=pack(batches), random=states), memory)
    with write_whole(path) as file:
        file.write(memory.getbuffer())


def read_dump(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], list, list]:
    """Read what :func:`write_dump` wrote; nothing in such a file is run as code.

    Returns:
        What it is about, the weights, and of each pass the batch and the random states.

    Raises:
        FileNotFoundError: There is no such file.
        UsageError: It is not a dump.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'dump {path} does not exist')
    try:
        content = read_checkpoint(path)
        about = json.loads(content['about'])
        if about['format'] != _FORMAT:
            raise ValueError(f'its format is {about["format"]}, not {_FORMAT}')
        return about, content['weights'], unpack(content['batches']), content['random']
    except Exception as error:
        # torch reports a damaged file by half a dozen exception types.
        reason = ' '.join(str(error).split())
        raise UsageError(f'{path} is no dump of a batch: {reason}') from error


def pack(value: Any) -> Any:
    """Turn a batch into tensors, numbers, texts, lists and dicts, which can be read safely.

    What is none of these becomes a tuple that begins with its type. Things of other types than
    tensors, arrays, OpenMMLab's data elements and Python's own are left out.
    """
    name = type(value).__name__
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biuf':
        return 'array', torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: pack(item) for key, item in value.items()}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, tuple):
        return 'tuple', [pack(item) for item in value]
    if isinstance(value, BaseDataElement):
        return name, pack(value.metainfo), pack(dict(value.items()))
    if name == 'HorizontalBoxes':
        return name, value.tensor.detach().cpu()
    return 'left out', name


def unpack(value: Any) -> Any:
    """Undo :func:`pack`; things that were left out become None."""
    if isinstance(value, dict):
        return {key: unpack(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, tuple):
        return value
    kind, *parts = value
    if kind == 'array':
        return parts[0].numpy()
    if kind == 'tuple':
        return tuple(unpack(parts[0]))
    if kind == 'left out':
        return None
    if kind not in _TYPES:
        raise ValueError(f'it holds a {kind}, which is none of {", ".join(_TYPES)}')
    made = getattr(import_module(_TYPES[kind]), kind)
    if kind == 'HorizontalBoxes':
        return made(parts[0])
    meta, fields = map(unpack, parts)
    element = made(metainfo=meta)
    for name, item in fields.items():
        setattr(element, name, item)
    return element


@contextmanager
def _watch(model: nn.Module) -> Iterator[list[str]]:
    """List the modules that make something not finite of what is.

    A model with hooks is computed by modules one after the other, where there are faster ways.
    """
    broken: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not _all_finite(output) and _all_finite(inputs):
            broken.append(f'{name} ({type(module).__name__})')

    handles = [module.register_forward_hook(partial(look, name))
               for name, module in model.named_modules() if not any(module.children())]
    try:
        yield broken
    finally:
        for handle in handles:
            handle.remove()


def _all_finite(value: Any) -> bool:
    return all(leaf.isfinite().all() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
