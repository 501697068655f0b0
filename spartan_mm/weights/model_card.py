"""What a repository of weights says of itself: README.md, from the file and the metafile."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..model_index import get_config, list_models, read_metafiles
from ..text import join, markdown, printable
from .hub import SCHEME
from .initialize import without_pretrained
from .loading import find_classes
from .safe_load import read_checkpoint
from .stored_config import find_test_dataset, read_config

# What the Hub calls what a model does.
_TASKS = {'detection': 'object-detection', 'classification': 'image-classification'}

#: The most classes that are named.
_MAX_CLASSES = 100


def make_card(path: str | Path, repository: str) -> str:
    """Write the card of a published file.

    Sizes are the metafile's. The paper's figures are said to be the paper's: how good these weights
    are nobody can tell from the file.

    Args:
        path: The published file.
        repository: ORG/NAME, where it will lie.

    Returns:
        Markdown, with the metadata that the Hub reads at its head.

    Raises:
        CheckpointError: The file is no published one.
    """
    checkpoint = read_checkpoint(path)
    config = read_config(checkpoint, path)
    task = 'detection' if config.default_scope == 'mmdet' else 'classification'
    name, classes = find_name(config, task), find_classes(checkpoint) or ()
    address = f'{SCHEME}{repository}'
    listed = join(classes, _MAX_CLASSES, write=lambda each: f'`{printable(each).replace("`", "")}`')
    parts = [
        f'---\nlibrary_name: spartan-mm\npipeline_tag: {_TASKS[task]}\ntags: [spartan-mm]\n---',
        f'# {repository.partition("/")[2]}',
        f'Weights for {task} with spartan_mm'
        + (f', of the architecture `{name}`.' if name else '.'),
        '```\n'
        f'spartan-mm infer photos/ {address} --out-dir outputs\n'
        f'spartan-mm demo {address}\n'
        '```',
        '```python\nfrom spartan_mm.inference import load_model\n\n'
        f"model = load_model('{address}')\n```",
        f'{len(classes)} classes: {listed}.']
    if name:
        parts.append(_describe(name, read_metafiles()[name]))
    parts.append('Files: safetensors and `.pth` say the same: weights, class names and config. '
                 'Neither is run when it is read.')
    return '\n\n'.join(parts) + '\n'


def find_name(config: Config, task: str) -> str | None:
    """Find the model of this package that a config builds, but for the number of classes.

    Of several, such as one at two sizes, it is one with the test pipeline of the config, if any.
    """
    wanted, pipeline = _architecture(config), find_test_dataset(config).get('pipeline')
    known = {name: get_config(name) for name in list_models(task=task)}
    fitting = [name for name, other in known.items() if _architecture(other) == wanted]
    return max(fitting, default=None, key=lambda name: find_test_dataset(known[name]).get(
        'pipeline') == pipeline)


def _architecture(config: Config) -> Any:
    return _without_classes(Config(dict(model=without_pretrained(config.model))).to_dict())


def _without_classes(value: Any) -> Any:
    """Leave out the numbers of classes, and whether a row of values is a list or a tuple."""
    if isinstance(value, Mapping):
        return {key: _without_classes(item) for key, item in value.items()
                if key not in ('num_classes', '_scope_')}
    if isinstance(value, list | tuple):
        return [*map(_without_classes, value)]
    return value


def _describe(name: str, entry: Mapping[str, Any]) -> str:
    """Say what the metafile says of a model."""
    known = entry['Metadata']
    rows = [[f'{name}, as its metafile has it', ''],
            *([key, str(known[key])] for key in ('Input Size', 'Parameters', 'FLOPs')
              if key in known)]
    figures = [f'{metric} {value} on {result["Dataset"]}' for result in entry.get('Results', ())
               if result['Source'] == 'paper' for metric, value in result['Metrics'].items()]
    text = markdown(rows)
    if figures:
        text += (f"\nThe paper's figures for this architecture, trained as the paper did: "
                 f'{join(figures)}. What these weights reach is not measured here.')
    return text.strip()
