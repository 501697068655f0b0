"""What trains the models: initialisation, parameter groups and hooks."""
from .amp import CPUAmpOptimWrapper
from .hooks import ChannelsLastHook, ClassCountCheckHook
from .initialize import ConvertedPretrained
from .optim import RuleOptimWrapperConstructor
from .pretrained import CheckedPretrained

__all__ = [
    'CPUAmpOptimWrapper', 'ChannelsLastHook', 'CheckedPretrained', 'ClassCountCheckHook',
    'ConvertedPretrained', 'RuleOptimWrapperConstructor'
]
