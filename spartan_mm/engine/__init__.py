"""What trains the models: parameter groups, loop and hooks."""
from .checkpoint_hook import ResumableCheckpointHook
from .compile import CompileHook, compile_model
from .finetune import FineTuneHook
from .hooks import (
    BackboneCheckHook,
    ChannelsLastHook,
    ClampPositionsHook,
    ClassCountCheckHook,
    OneWriterLoggerHook,
    StrictCheckpointHook,
)
from .little_data import (
    BatchNormEvalHook,
    PlainEndHook,
    ResumableEarlyStoppingHook,
    StepsAwareEMAHook,
)
from .nan_guard import FiniteNumbersHook
from .optim import RuleOptimWrapperConstructor
from .resume import ResumableTrainLoop
from .schedules import FlatCosineLR
from .signals import LeaveOnSignalHook

__all__ = [
    'BackboneCheckHook', 'BatchNormEvalHook', 'ChannelsLastHook', 'ClampPositionsHook',
    'ClassCountCheckHook', 'CompileHook', 'FineTuneHook', 'FiniteNumbersHook', 'FlatCosineLR',
    'LeaveOnSignalHook', 'OneWriterLoggerHook', 'PlainEndHook', 'ResumableCheckpointHook',
    'ResumableEarlyStoppingHook', 'ResumableTrainLoop', 'RuleOptimWrapperConstructor',
    'StepsAwareEMAHook', 'StrictCheckpointHook', 'compile_model'
]
