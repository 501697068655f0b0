"""What an exported file says of itself: all that running it takes, and where it comes from."""
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from ..errors import UsageError
from ..version import __version__
from ..weights.stored_config import as_text
from .graph import Detect

#: Where sides are free, they are whole multiples of the one from the other on.
MULTIPLE, MIN_SIDE = 32, 64

#: Which meaning the entries have; the runtime refuses what is newer than it knows.
FORMAT = 1

_PACKAGES = ('torch', 'onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf')


def find_size(resize: Mapping[str, Any] | None, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width that a graph is made for.

    Args:
        resize: What :func:`~.preprocessing.describe_resize` gave; None if nobody knows.
        size: What was asked for; None for what `resize` makes.

    Raises:
        UsageError: Neither is known.
    """
    if size is not None:
        return tuple(size)
    found = resize and (resize.get('crop') or resize['size'])
    if not isinstance(found, list | tuple):
        raise UsageError('the test pipeline of the config does not say what size images get: name '
                         'it by --size HEIGHT WIDTH')
    return tuple(found)


def describe(graph: nn.Module, cfg: Config, name: str, classes: Sequence[str],
             checkpoint: Path | None, resize: Mapping[str, Any] | None, size: tuple[int, int],
             dynamic: Sequence[str], precision: str = 'fp32') -> dict[str, Any]:
    """Everything but the check; see docs/deploy.md for the meaning of each entry.

    Args:
        graph: What :func:`~.graph.make_graph` gave.
        cfg: The model's config.
        name: Of the model.
        classes: Their names; empty if nobody knows them.
        checkpoint: The file of the weights; None if they are random.
        resize: How images come to `size`; None if nobody knows.
        size: Height and width of the images.
        dynamic: Free axes, of 'batch' and 'size'.
        precision: 'fp32', 'fp16', 'bf16' or 'int8'.
    """
    normalize = graph.normalize
    inside = {key: None if value is None else value.flatten().tolist()
              for key, value in (('mean', normalize.mean), ('std', normalize.std))}
    detector = dict(num_queries=graph.model.num_queries,
                    max_per_img=graph.model.bbox_head.test_cfg.get('max_per_img', 300)
                    ) if isinstance(graph, Detect) else {}
    return dict(
        format=FORMAT, spartan_mm=__version__,
        task='detection' if isinstance(graph, Detect) else 'classification', model=name,
        config_sha256=hashlib.sha256(as_text(cfg.to_dict()).encode()).hexdigest(),
        checkpoint_sha256=checkpoint and hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        classes=list(classes) or None,
        input=dict(size=list(size), dynamic=list(dynamic), multiple_of=MULTIPLE, min_size=MIN_SIDE,
                   color='RGB', range=[0, 255], normalized_inside=True, **inside),
        resize=resize and dict(resize), outputs=list(graph.output_names), raw=graph.raw, **detector,
        precision=precision, versions={
            package: found for package in _PACKAGES if (found := _find_version(package))})


def as_properties(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Each entry as JSON, which ONNX and OpenVINO keep as text."""
    return {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
