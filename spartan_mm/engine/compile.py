"""torch.compile where it pays: on what makes tensors from tensors."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

PARTS = ('backbone', 'neck')


def compile_model(model: nn.Module, mode: str | None = None, dynamic: bool | None = None,
                  **options: Any) -> None:
    """Compile a model of OpenMMLab's packages in place; names in its state dict stay.

    A model that knows its own parts, as RTDETR does, is asked to compile itself; of others backbone
    and neck are compiled. Heads, which read data samples, run as they are. Nothing is compiled
    before its first call.

    NOTE: mmengine's ``compile=True`` in a config hands the whole training step to torch.compile,
    data samples, matching and optimizer included: each is traced for long and broken up.

    Args:
        model: A detector, classifier or backbone; what wraps one for distributed training is seen
            through.
        mode: As torch.compile's; 'reduce-overhead' for CUDA graphs, where sizes stay the same.
        dynamic: True compiles for all sizes at once, False for each size anew, None for the first
            size and, once another comes, for all.
        options: Others of torch.compile.

    Raises:
        RuntimeError: ``torch.compile`` knows no such mode; the message lists them.
    """
    model = model.module if is_model_wrapper(model) else model
    parts = [model]
    if type(model).compile is nn.Module.compile:  # not its own
        parts = [part for name in PARTS if (part := getattr(model, name, None)) is not None]
    for part in parts or [model]:
        part.compile(mode=mode, dynamic=dynamic, **options)


@HOOKS.register_module()
class CompileHook(Hook):
    """Compile the model before the run.

    Args:
        options: Those of :func:`compile_model`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def before_run(self, runner: Runner) -> None:
        """Compile."""
        compile_model(runner.model, **self.options)
