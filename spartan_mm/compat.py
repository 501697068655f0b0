"""The one place that makes up for missing or changed dependencies, each with its reason.

Nothing here replaces what is installed and works: every function first looks whether it is needed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

MMCV_EXT = 'mmcv._ext'


def require(import_name: str, minimum: str, extra: str) -> ModuleType:
    """Import a package this one builds on, or say in one sentence what is missing or too old.

    The check goes by import name, because two families of distributions provide the same modules:
    the original ``mmengine``, ``mmcv``, ``mmdet`` and ``mmpretrain``, and the maintained
    ``onedl-*`` builds.

    Args:
        import_name: the module to import, such as ``'mmdet'``.
        minimum: the oldest version that works.
        extra: the extra of this package that installs it.

    Returns:
        The imported module.

    Raises:
        ImportError: if the package is missing, too old, or refuses another package's version.

    Example:
        >>> require('mmengine', '0.10.0', 'backbone').__name__
        'mmengine'
        >>> require('mmengine', '99.0', 'backbone')
        Traceback (most recent call last):
            ...
        ImportError: spartan_mm needs mmengine >= 99.0, but ... is installed; update it with ...
    """
    remedy = f"`pip install 'spartan_mm[{extra}]'` or your own choice of {import_name} >= {minimum}"
    try:
        module = importlib.import_module(import_name)
    except ModuleNotFoundError as error:
        if error.name != import_name:
            raise ImportError(
                f'spartan_mm needs {import_name}, which is installed but cannot be imported '
                f'because it needs {error.name}; install that, too') from error
        raise ImportError(f'spartan_mm needs {import_name} >= {minimum}, which is not installed; '
                          f'install it with {remedy}') from error
    except AssertionError as error:
        # mmdet 3.3 and mmpretrain 1.2 assert the range of mmcv and mmengine versions on import.
        raise ImportError(f'spartan_mm needs {import_name}, which is installed but refuses another '
                          f'package: {error}') from error

    found = getattr(module, '__version__', None)
    try:
        too_old = Version(found) < Version(minimum)
    except (InvalidVersion, TypeError):
        # A source checkout may carry a version nobody can compare: let it try.
        too_old = False
    if too_old:
        raise ImportError(f'spartan_mm needs {import_name} >= {minimum}, but {found} is installed; '
                          f'update it with {remedy}')
    return module


def _raise_missing_op(op: str, /, *args, **kwargs) -> None:
    raise RuntimeError(
        f"mmcv's op '{op}' needs compiled code, and the installed mmcv has none (no module "
        f'{MMCV_EXT}). Nothing in spartan_mm uses this op; to use it, replace mmcv by a build with '
        'compiled ops: `mim install mmcv`, or from source `MMCV_WITH_OPS=1 pip install '
        '--no-build-isolation --no-binary mmcv mmcv`. It is then picked up by itself.')


class MMCVExtStandIn(ModuleType):
    """Stands in for ``mmcv._ext``, mmcv's compiled extension, where mmcv was installed without it.

    mmcv looks its ops up by name when ``mmcv.ops`` is imported, and ``mmdet.models`` imports
    ``mmcv.ops``: without the extension no detector can be built, even one that calls none of the
    ops. Here every name resolves to a function. ``nms`` computes; any other op raises when called.
    """

    def __init__(self) -> None:
        super().__init__(MMCV_EXT, doc=type(self).__doc__)
        # No loader: mmcv.utils.check_ops_exist() asks for one and rightly answers False.
        self.__spec__ = ModuleSpec(MMCV_EXT, loader=None, origin=__name__)
        self.__package__ = 'mmcv'

    def __getattr__(self, name: str) -> Callable:
        # What walks sys.modules (inspect, pickle, doctest) probes for names such as __file__ and
        # __wrapped__ and must see an ordinary module without them.
        if name.startswith('__'):
            raise AttributeError(f'module {MMCV_EXT!r} has no attribute {name!r}')
        op = partial(_raise_missing_op, name)
        setattr(self, name, op)
        return op

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
        """Greedy non-maximum suppression with torchvision, in the terms of mmcv's op.

        Args:
            boxes: corners x1, y1, x2, y2, shape (N, 4).
            scores: shape (N,).
            iou_threshold: a box is dropped if it overlaps a better one by more than this.
            offset: 0 for a width of x2 - x1; 1 for x2 - x1 + 1, the convention in which x2 and y2
                name the last pixel inside.

        Returns:
            Indices of the kept boxes, best score first, shape (K,).

        Raises:
            ImportError: if torchvision is missing.
        """
        try:
            from torchvision.ops import nms
        except ImportError as error:
            raise ImportError(
                'non-maximum suppression without compiled mmcv needs torchvision; install the '
                f'torchvision that belongs to torch {torch.__version__}') from error
        if offset:
            # One more pixel to the right and below gives the width, the height and the overlap of
            # the inclusive convention.
            boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
        if boxes.dtype not in (torch.float32, torch.float64):
            boxes = boxes.float()
        return nms(boxes, scores.to(boxes.dtype), iou_threshold)

    @staticmethod
    def get_compiler_version() -> str:
        """Say that nothing was compiled, where mmcv lists its environment."""
        return 'n/a'

    @staticmethod
    def get_compiling_cuda_version() -> str:
        """Say that nothing was compiled, where mmcv lists its environment."""
        return 'n/a'


def stand_in_for_mmcv_ext() -> bool:
    """Put :class:`MMCVExtStandIn` in the place of ``mmcv._ext`` if mmcv is installed without it.

    mmcv itself is looked up, not imported.

    Returns:
        Whether the stand-in is in place; False with a real extension, or without mmcv.
    """
    if MMCV_EXT in sys.modules:
        return isinstance(sys.modules[MMCV_EXT], MMCVExtStandIn)
    mmcv = importlib.util.find_spec('mmcv')
    if mmcv is None or mmcv.submodule_search_locations is None:
        return False
    if PathFinder.find_spec(MMCV_EXT, list(mmcv.submodule_search_locations)) is not None:
        return False
    sys.modules[MMCV_EXT] = MMCVExtStandIn()
    return True


def read_checkpoints_safely() -> None:
    """Have mmengine, and all that loads through it, read checkpoints without running code in them.

    The onedl builds of mmengine unpickle whatever torch refuses to read as weights; the original
    does so before torch 2.6, and from then on cannot resume from its own checkpoints; both unpickle
    what they download. Here :mod:`spartan_mm.engine.reading` reads for both, safetensors files,
    too.
    """
    from mmengine.runner import checkpoint as module

    from .engine import reading
    loader = module.CheckpointLoader
    loader.register_scheme('', reading.load_from_local, force=True)
    loader.register_scheme(['http://', 'https://'], reading.load_from_http, force=True)
    # Loaders of other schemes call it by name: open-mmlab://, torchvision://, mmcls://.
    module.load_from_http = reading.load_from_http
    # Two stores in which no public model lies.
    others = [scheme for scheme in loader._schemes
              if any(store in scheme for store in ('s3://', 'petrel://', 'pavi://'))]
    loader.register_scheme(others, reading.refuse_scheme, force=True)
