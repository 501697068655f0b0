"""The one place that makes up for what dependencies lack or do wrong, each with its reason.

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
from torch import Tensor

from .requirements import RequirementError

MMCV_EXT = 'mmcv._ext'


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
            boxes: Corners x1, y1, x2, y2, shape (N, 4).
            scores: Shape (N,).
            iou_threshold: A box is dropped if it overlaps a better one by more than this.
            offset: 0 for a width of x2 - x1; 1 for x2 - x1 + 1, the convention in which x2 and y2
                name the last pixel inside.

        Returns:
            Indices of the kept boxes, best score first, shape (K,).

        Raises:
            RequirementError: Torchvision is missing.
        """
        try:
            from torchvision.ops import nms
        except ImportError as error:
            raise RequirementError(
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
