"""What trains the models: parameter groups, loop and hooks."""
from .checkpoint_hook import ResumableCheckpointHook
from .compile import CompileHook, compile_model
from .finetune import FineTuneHook
from .hooks import (
    ChannelsLastHook,
    ClassCountCheckHook,
    OneWriterLoggerHook,
    StrictCheckpointHook,
)
from .nan_guard import FiniteNumbersHook
from .optim import RuleOptimWrapperConstructor
from .resume import ResumableTrainLoop
from .schedules import FlatCosineLR
from .signals import LeaveOnSignalHook

__all__ = [
    'ChannelsLastHook', 'ClassCountCheckHook', 'CompileHook', 'FineTuneHook', 'FiniteNumbersHook',
    'FlatCosineLR', 'LeaveOnSignalHook', 'OneWriterLoggerHook', 'ResumableCheckpointHook',
    'ResumableTrainLoop', 'RuleOptimWrapperConstructor', 'StrictCheckpointHook', 'compile_model'
]
