"""What trains the models: initialisation, parameter groups and hooks."""
from .hooks import ClassCountCheckHook
from .initialize import ConvertedPretrained
from .optim import RuleOptimWrapperConstructor

__all__ = ['ClassCountCheckHook', 'ConvertedPretrained', 'RuleOptimWrapperConstructor']
