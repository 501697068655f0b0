"""What trains the models: initialisation, parameter groups and hooks."""
from .amp import CPUAmpOptimWrapper
from .checkpoint import StrictCheckpointHook
from .compile import CompileHook, compile_model
from .finetune import FineTuneHook
from .hooks import ChannelsLastHook, ClassCountCheckHook
from .initialize import ConvertedPretrained
from .numbers import FiniteNumbersHook
from .optim import RuleOptimWrapperConstructor
from .pretrained import CheckedPretrained
from .resume import ResumableTrainLoop
from .saving import LeaveOnSignalHook, OneWriterLoggerHook, ResumableCheckpointHook

__all__ = [
    'CPUAmpOptimWrapper', 'ChannelsLastHook', 'CheckedPretrained', 'ClassCountCheckHook',
    'CompileHook', 'ConvertedPretrained', 'FineTuneHook', 'FiniteNumbersHook', 'LeaveOnSignalHook',
    'OneWriterLoggerHook', 'ResumableCheckpointHook', 'ResumableTrainLoop',
    'RuleOptimWrapperConstructor', 'StrictCheckpointHook', 'compile_model'
]
