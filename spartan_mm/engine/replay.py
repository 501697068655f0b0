"""A batch with a loss or gradient that is no finite number, run through the model once more."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ..weights.loading import load_all_weights
from .numbers import read_dump, set_random_states


@dataclass
class Replay:
    """What a batch did this time.

    Args:
        about: what the dump says of that time: iteration, images, terms ...
        terms: of each pass, the values of what the model's loss returned.
        first_broken: the first modules that made a NaN or infinite output of finite inputs, in the
            order in which they ran; at most one for each pass.
        broken_gradients: names of the parameters whose gradient is not finite.
    """

    about: dict[str, Any]
    terms: list[dict[str, float]] = field(default_factory=list)
    first_broken: list[str] = field(default_factory=list)
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
        config: the config of the training.
        path: what :class:`FiniteNumbersHook` has written.
        device: such as 'cpu' or 'cuda:0'; None for the kind that the training ran on, if there is
            one.

    Raises:
        FileNotFoundError: the config or the dump does not exist.
        ValueError: the dump is none.
        CheckpointError: the weights in it are not those of the config's model.
    """
    if not Path(config).is_file():
        raise FileNotFoundError(f'config {config} does not exist')
    cfg = Config.fromfile(config)
    about, weights, batches, states = read_dump(path)
    if device is None:
        device = get_device() if about['device'] != 'cpu' else 'cpu'

    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'):
        model = MODELS.build(cfg.model)
    load_all_weights(model, dict(state_dict=weights), str(path))
    model.to(device).train()

    result = Replay(about)
    dtype = about['autocast'] and getattr(torch, about['autocast'])
    for batch, random_states in zip(batches, states, strict=True):
        set_random_states(random_states)
        context = torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()
        with _watch(model) as broken, context:
            losses = model(**_to(batch, device), mode='loss')
        loss, terms = model.parse_losses(losses)
        result.terms.append({name: float(term) for name, term in terms.items() if name != 'loss'})
        result.first_broken += broken[:1]
        loss.backward()
    result.broken_gradients = [name for name, parameter in model.named_parameters()
                               if parameter.grad is not None
                               and not parameter.grad.isfinite().all()]
    return result


@contextmanager
def _watch(model: nn.Module) -> Iterator[list[str]]:
    """List the modules that make something not finite of what is.

    What has hooks is computed by modules one after the other, where there are faster ways.
    """
    broken: list[str] = []

    def look(name: str, inputs: Any, output: Any) -> None:
        if not _all_finite(output) and _all_finite(inputs):
            broken.append(name)

    handles = [module.register_forward_hook(
        lambda module, inputs, output, name=name: look(f'{name} ({type(module).__name__})', inputs,
                                                       output))
        for name, module in model.named_modules() if not any(module.children())]
    try:
        yield broken
    finally:
        for handle in handles:
            handle.remove()


def _to(value: Any, device: str) -> Any:
    """Bring what is in dicts, lists and tuples to a device."""
    if isinstance(value, (Tensor, BaseDataElement)):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to(item, device) for item in value)
    return value


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return True
    return all(_all_finite(item) for item in value)
