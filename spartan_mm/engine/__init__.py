"""What trains the models: parameter groups, hooks, loops."""
from .amp import CPUAmpOptimWrapper
from .checkpoint import StrictCheckpointHook
from .compile import CompileHook, compile_model
from .finetune import FineTuneHook
from .hooks import ChannelsLastHook, ClassCountCheckHook
from .numbers import FiniteNumbersHook
from .optim import RuleOptimWrapperConstructor
from .resume import ResumableTrainLoop
from .saving import LeaveOnSignalHook, OneWriterLoggerHook, ResumableCheckpointHook

__all__ = [
    'CPUAmpOptimWrapper', 'ChannelsLastHook', 'ClassCountCheckHook', 'CompileHook', 'FineTuneHook',
    'FiniteNumbersHook', 'LeaveOnSignalHook',
    'OneWriterLoggerHook', 'ResumableCheckpointHook', 'ResumableTrainLoop',
    'RuleOptimWrapperConstructor', 'StrictCheckpointHook', 'compile_model'
]
