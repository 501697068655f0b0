"""The config inside of a checkpoint: as plain data, as publishing writes it, or as text.

mmengine's trainings, and what was published before, have it as Python text. Nothing but plain data
of what is registered passes in either form, see :mod:`.config_text`.
"""
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from ..errors import CheckpointError
from .config_text import CodeError, check, read_text
from .initialize import without_training
from .loading import find_meta
from .safe_load import local_file, read_checkpoint


def config_from(path: str | Path) -> Config:
    """Read the config inside of a checkpoint, and import the modules that it names.

    Args:
        path: A file that publishing or a training wrote, or its URL.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It cannot be read, or has no config that can be used.
    """
    config = read_config(read_checkpoint(local_file(path)), path)
    if config is None:
        raise CheckpointError(f'{path} holds no config; name the config that it was trained with, '
                              'too')
    return config


def read_config(checkpoint: Any, name: str | Path) -> Config | None:
    """Read the config inside of a checkpoint, if there is one, and import what it names.

    Args:
        checkpoint: What :func:`read_checkpoint` gave.
        name: What to call the checkpoint in an error message.

    Raises:
        CheckpointError: The config would run code, or is none.
    """
    plain = _plain_config(checkpoint)
    text = next((place[key] for place, key in text_places(checkpoint)), None)
    if plain is None and text is None:
        return None
    try:
        if plain is None:
            content = read_text(text)
        else:
            _check_size(plain)
            content = from_plain(plain)
            check(content)
        if 'model' in content:
            # The weights are in the file.
            content['model'] = without_training(content['model'])
        return make_config(content)
    except CodeError as error:
        raise CheckpointError(_refusal(name, error)) from None
    except Exception as error:  # whatever Python says about what is no config
        raise CheckpointError(f'the config inside of {name} cannot be used: {error}') from error


def make_config(content: dict[str, Any]) -> Config:
    """Make a config of its content, which was looked through, and import what it names."""
    if content.get('custom_imports'):
        import_modules_from_strings(**content['custom_imports'])
    return Config(content)


def find_test_dataset(config: Config) -> Mapping[str, Any]:
    """Find the settings of a config's test dataset, inside of all that wraps it; {} if none."""
    dataset = (config.get('test_dataloader') or {}).get('dataset', {})
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def find_problem(text: str, name: str | Path) -> str | None:
    """Say why a config of text must not be run; None if it may, or is no Python at all."""
    try:
        read_text(text)
    except CodeError as error:
        return _refusal(name, error)
    except (SyntaxError, ValueError):
        pass
    return None


def _refusal(name: str | Path, error: CodeError) -> str:
    return (f'{name} is refused: the config in it would run code ({error}), or build what is not '
            'registered, as soon as it is used. Nothing was run. If it is your own, give the '
            'config file beside the checkpoint; else ask for the weights alone')


def text_places(checkpoint: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Find the configs of text where mmengine looks for them, in its order: dict and key."""
    places = (('message_hub', 'runtime_info', 'cfg'), ('meta', 'cfg'), ('meta', 'config'))
    for *outer, last in places:
        found = checkpoint
        for key in outer:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict) and isinstance(found.get(last), str):
            yield found, last


def give_text(checkpoint: Any) -> None:
    """Add a published config as text, for readers that know no other; see :func:`find_problem`."""
    plain = _plain_config(checkpoint)
    if plain is not None and 'cfg' not in checkpoint['meta']:
        try:
            _check_size(plain)
            checkpoint['meta']['cfg'] = as_text(from_plain(plain))
        except Exception:  # Who asks is told that there is no config.
            pass


def as_text(content: Mapping[str, Any]) -> str:
    r"""Write plain content of a config as Python, an entry a line.

    Example:
        >>> as_text(dict(lr=0.1, model=dict(type='RTDETR', sizes=(1, 2))))
        "lr = 0.1\nmodel = {'type': 'RTDETR', 'sizes': (1, 2)}\n"
    """
    return ''.join(f'{name} = {value!r}\n' for name, value in content.items())


def to_plain(value: Any) -> Any:
    """Put plain values of Python into what JSON has; tuples, sets and unusual dicts are marked.

    Raises:
        TypeError: It is none of these, or holds what is none.
        ValueError: It holds a number that is not finite.

    Example:
        >>> to_plain(dict(sizes=(1, [2]), names={-1: 'a'}))
        {'sizes': {'$tuple': [1, [2]]}, 'names': {'$dict': [[-1, 'a']]}}
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f'{value} is no finite number')
        return value
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if type(value) is tuple:
        return {'$tuple': [to_plain(item) for item in value]}
    if type(value) is set:
        return {'$set': [to_plain(item) for item in sorted(value, key=repr)]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith('$') for key in value):
            return {key: to_plain(item) for key, item in value.items()}
        return {'$dict': [[to_plain(key), to_plain(item)] for key, item in value.items()]}
    raise TypeError(f'{value!r} is of type {type(value).__name__}')


def from_plain(value: Any) -> Any:
    """Undo :func:`to_plain`; a TypeError or ValueError if nothing there could have made it.

    Example:
        >>> from_plain({'sizes': {'$tuple': [1, [2]]}})
        {'sizes': (1, [2])}
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f'it holds a {type(value).__name__}')
    mark = next((key for key in value if key.startswith('$')), None)
    if mark is None:
        return {key: from_plain(item) for key, item in value.items()}
    [items] = value.values()
    kinds = {'$tuple': tuple, '$set': set, '$dict': dict}
    if mark not in kinds:
        raise ValueError(f'it has the unknown mark {mark}')
    return kinds[mark](from_plain(items))


def _check_size(plain: Any, limit: int = 1_000_000) -> None:
    """Refuse what is small in a file, and endless for who goes through it, part by part."""
    waiting, count = [plain], 0
    while waiting:
        value = waiting.pop()
        count += 1
        waiting.extend(value.values() if isinstance(value, dict) else
                       value if isinstance(value, list) else ())
        if count + len(waiting) > limit:
            raise ValueError(f'it has more than {limit:,} parts')


def _plain_config(checkpoint: Any) -> dict[str, Any] | None:
    """Find the config that publishing wrote."""
    plain = find_meta(checkpoint).get('config')
    return plain if isinstance(plain, dict) else None
