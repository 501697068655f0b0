"""The models of this package by name, see also ``model_index.py``."""
import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from .datasets.classes import check_names
from .model_index import (
    CONFIG_SUFFIXES,
    TASKS,
    UnknownModelError,
    config_path,
    find_config,
    get_config,
    is_checkpoint,
    list_models,
    read_metafiles,
    root,
    task_of,
)
from .weights.initialize import without_training
from .weights.loading import find_classes, find_meta

__all__ = [
    'CONFIG_SUFFIXES', 'TASKS', 'UnknownModelError', 'config_path', 'find_config', 'get_config',
    'get_model', 'is_checkpoint', 'list_models', 'read_metafiles', 'root', 'task_of'
]


def get_model(name: str | Config, pretrained: str | Path | None = None,
              num_classes: int | None = None, match_classes: str | None = None) -> nn.Module:
    """Build a model, in evaluation mode.

    Nothing is downloaded unless ``pretrained`` says so: without it the weights are random, also
    those of a backbone for which the config names a pretrained file.

    Args:
        name: One of :func:`list_models`, or a config, for a model with other settings.
        pretrained: A checkpoint with all weights: a local path, a URL or an address on the Hugging
            Face Hub, such as 'hf://ORG/NAME'; None for random weights.
        num_classes: Number of classes; None for what the config says.
        match_classes: What to do if a config names other classes for its test data than the
            checkpoint: 'name' to put the outputs in the config's order, 'number' to keep those of
            the checkpoint, None to refuse.

    Raises:
        UnknownModelError: There is no such model; the message has the closest names.
        ImportError: What the model's task needs is not installed; the message says what to do.
        FileNotFoundError: There is no checkpoint at the path ``pretrained``.
        CheckpointError: The checkpoint belongs to another architecture, has other classes, or names
            more or fewer than the model has.

    Example:
        >>> model = get_model('spartan_xt', num_classes=10)
        >>> type(model).__name__, model.head.fc.out_features
        ('ImageClassifier', 10)
    """
    config = get_config(name) if isinstance(name, str) else copy.deepcopy(name)
    classifies = config.default_scope == 'mmpretrain'
    if num_classes is not None:
        parts = ('head', 'data_preprocessor') if classifies else ('bbox_head', )
        config.merge_from_dict({f'model.{part}.num_classes': num_classes for part in parts})

    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(without_training(config.model))
    if pretrained is None:
        with quiet():  # mmengine reports a line for each of them
            model.init_weights()
        meta = {}
    else:
        # It takes mmengine's runner along.
        from .engine.class_order import load_in_order
        with DefaultScope.overwrite_default_scope(config.default_scope):
            checkpoint = load_in_order(model, config, pretrained, match_classes)
        check_names(model, find_classes(checkpoint) or (), str(pretrained))
        meta = find_meta(checkpoint).get('dataset_meta') or {}
    # Where the toolboxes' inferencers look for them.
    if classifies:
        model._config, model._dataset_meta = config, meta
    else:
        model.cfg, model.dataset_meta = config, meta
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep mmengine's remarks on what is being built off the screen."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
