"""The classes of a checkpoint beside those of the data that it is used on."""
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn

from ..datasets.classes import find_heads
from ..errors import CheckpointError
from ..text import count, join
from ..weights.forms import switch_to_deploy
from ..weights.loading import fill_for_inference, find_classes, find_meta, find_state_dict
from ..weights.safe_load import local_file, read_checkpoint
from ..weights.stored_config import find_test_dataset
from .finetune import find_rows, fit_classes
from .hooks import StrictCheckpointHook, classes_of

#: What to do about classes that differ: put the outputs in the order of the data by their names, or
#: take those of the same number for the same.
Match = Literal['name', 'number'] | None


class OrderedCheckpointHook(StrictCheckpointHook):
    """Stops a test on other classes than the checkpoint's, or on the same ones in another order.

    NOTE: mmengine compares nothing; another order gives a lower AP and no error.

    Args:
        match: What to do instead of stopping, see :data:`Match`.
    """

    def __init__(self, match: Match = None) -> None:
        self.match = match

    def find_weights(self, runner: Runner, model: nn.Module, checkpoint: dict[str, Any],
                     name: str) -> dict[str, Tensor]:
        """Find the weights, in the order of the test dataset if classes are matched by name."""
        ours = classes_of(runner.test_dataloader.dataset, 'test_dataloader')
        checkpoint = put_in_order(model, runner.cfg.model, checkpoint, name, ours, 'the test data',
                                  self.match)
        return super().find_weights(runner, model, checkpoint, name)


def put_in_order(model: nn.Module, model_cfg: Mapping[str, Any], checkpoint: dict[str, Any],
                 name: str, ours: Sequence[str] | None, owner: str, match: Match = None
                 ) -> dict[str, Any]:
    """Compare the classes of a checkpoint with others, and put them in their order if asked to.

    Where one side has no names, there is nothing to compare, and nothing to match.

    Args:
        model: The model; it takes its deploy form if the checkpoint has it and its classes move.
        model_cfg: Config of the model.
        checkpoint: The checkpoint.
        name: What to call it.
        ours: Names of the other classes; None if unknown.
        owner: Whose these are.
        match: What to do if they differ; None to refuse.

    Returns:
        The checkpoint; matched by name, one that differs in the weights of its classes and in their
        names.

    Raises:
        CheckpointError: The classes differ, or cannot be matched.
    """
    theirs = find_classes(checkpoint)
    if find_order(theirs, ours, f'checkpoint {name}', owner, match) is None:
        return checkpoint
    differ = describe_classes(f'checkpoint {name}', theirs, ours, owner)
    for head in find_heads(model):
        if head.num_classes != len(ours):
            raise CheckpointError(f'{differ}. To match them by name, the model needs as many as '
                                  f'{owner}: set model.{head.path}.num_classes={len(ours)}')
    if find_meta(checkpoint).get('deploy'):
        switch_to_deploy(model)
    own = model.state_dict()
    weights, changes = fit_classes(find_state_dict(checkpoint, name), own,
                                   find_rows(model_cfg, own), [*map(_simplify, theirs)],
                                   [*map(_simplify, ours)])
    outputs = {change.known for change in changes}
    if outputs != {len(theirs)}:
        raise CheckpointError(f'{differ}. They cannot be matched by name, for it has '
                              f'{join(outputs, none="no known")} outputs')
    meta = find_meta(checkpoint)
    dataset_meta = dict(meta.get('dataset_meta') or {}, classes=tuple(ours))
    dataset_meta.pop('palette', None)
    return dict(checkpoint, state_dict=weights, meta=dict(meta, dataset_meta=dataset_meta))


def find_order(theirs: Sequence[str] | None, ours: Sequence[str] | None, name: str, owner: str,
               match: Match = None) -> list[int] | None:
    """Find each of our classes among those of a checkpoint.

    Args:
        theirs: Names of the checkpoint's classes; None if unknown.
        ours: Names of the other classes; None if unknown.
        name: What to call the checkpoint.
        owner: Whose `ours` are.
        match: What to do if they differ; None to refuse.

    Returns:
        The number that each has there; None if nothing has to move.

    Raises:
        CheckpointError: The classes differ, or cannot be matched.
    """
    if match == 'name' and None in (theirs, ours):
        raise CheckpointError('classes cannot be matched by name, for there are no names in '
                              + (name if theirs is None else owner))
    if match == 'number' or same_classes(theirs, ours):
        return None
    differ = describe_classes(name, theirs, ours, owner)
    if match is None:
        raise CheckpointError(
            f'{differ}. Give the data the names and the order of the checkpoint, or match the '
            "classes: by name (--match-classes name, in Python match_classes='name'), or by number "
            'if they are the same under other names (number)')
    known = [_simplify(one) for one in theirs]
    unknown = [one for one in ours if _simplify(one) not in known]
    if unknown:
        raise CheckpointError(f'{differ}. They cannot be matched by name, for the checkpoint does '
                              f'not know {join(map(repr, unknown))}')
    return [known.index(_simplify(one)) for one in ours]


def follow_config(model: nn.Module, config: Config, checkpoint: Any, name: str, match: Match = None
                  ) -> Any:
    """Do what :func:`put_in_order` does, with the classes that a config names for its test data.

    A config whose classes have no name in common with the checkpoint's, or the same places, gives
    the architecture alone: the outputs have the checkpoint's names.
    """
    ours = (find_test_dataset(config).get('metainfo') or {}).get('classes')
    ours = (ours, ) if isinstance(ours, str) else ours
    theirs = find_classes(checkpoint)
    if match is None and None not in (theirs, ours):
        places = [{_simplify(one): label for label, one in enumerate(names)}
                  for names in (theirs, ours)]
        if all(places[1].get(one, label) == label for one, label in places[0].items()):
            return checkpoint
    return put_in_order(model, config.model, checkpoint, name, ours, "the config's test dataset",
                        match)


def load_in_order(model: nn.Module, config: Config, path: str | Path, match: Match = None
                  ) -> dict[str, Any]:
    """Do what :func:`follow_config` and :func:`load_for_inference` do, with a file or a URL."""
    checkpoint = follow_config(model, config, read_checkpoint(local_file(path)), str(path), match)
    fill_for_inference(model, checkpoint, str(path))
    return checkpoint


def same_classes(theirs: Sequence[str] | None, ours: Sequence[str] | None) -> bool:
    """Whether classes are the same in the same order, as far as they have names.

    Case, blanks, hyphens and underscores make no difference.

    Example:
        >>> same_classes(['traffic light'], ['Traffic_Light']), same_classes(['a', 'b'], ['b', 'a'])
        (True, False)
    """
    return None in (theirs, ours) or [*map(_simplify, theirs)] == [*map(_simplify, ours)]


def describe_classes(name: str, theirs: Sequence[str], ours: Sequence[str], owner: str) -> str:
    """Say what the classes of a checkpoint are, and what others."""
    first = next((label for label, pair in enumerate(zip(theirs, ours, strict=False))
                  if not same_classes(*([one] for one in pair))), min(len(theirs), len(ours)))
    start = max(0, first - 1)
    orders = [f'{"..., " if start else ""}{join(names[start:], 5)}' for names in (theirs, ours)]
    return (f'the classes of {name} are not those of {owner}: it has '
            f'{count(len(theirs), "class")} ({orders[0]}), {owner} has {len(ours)} ({orders[1]}), '
            f'and class {first} is the first that differs')


def _simplify(name: Any) -> str:
    return re.sub(r'[\s_-]+', ' ', str(name)).strip().casefold()
