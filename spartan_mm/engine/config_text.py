"""Configs as text inside checkpoints: they are run as Python, so they have to be plain data."""
import ast
import builtins
import sys

from mmengine.registry import FUNCTIONS

# What a dumped config consists of.
_PLAIN = (ast.Module, ast.Assign, ast.Name, ast.Load, ast.Store, ast.Constant, ast.Dict, ast.List,
          ast.Tuple, ast.Set, ast.Call, ast.keyword, ast.UnaryOp, ast.USub, ast.UAdd)
_HARMLESS = ('dict', 'float', 'frozenset', 'int', 'list', 'range', 'set', 'slice', 'tuple')


def find_code(text: str) -> str | None:
    """Look for what a config would run beyond assigning values.

    mmengine takes the config of a checkpoint for Python and runs it, and builds objects from
    whatever ``type`` names, functions of Python's own library included. The configs that it writes
    are assignments of literals.

    Args:
        text: a config, as ``Config.pretty_text`` gives it.

    Returns:
        The first suspect part; None if there is none, or if the text is no Python at all.

    Example:
        >>> find_code("model = dict(type='RTDETR', test_cfg=dict(max_per_img=300))")
        >>> find_code("model = dict(type='os.system', command='ls')")
        "line 1: type='os.system'"
        >>> find_code("import os")
        'line 1: import os'
    """
    # mmengine replaces these in the text before it runs it.
    if '{{' in text:
        return "'{{', a placeholder"
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if _runs_code(node):
            line = getattr(node, 'lineno', 1)
            return f'line {line}: {ast.unparse(node)[:80]}'
    return None


def _runs_code(node: ast.AST) -> bool:
    if not isinstance(node, _PLAIN):
        return True
    if isinstance(node, ast.Assign):
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        return len(names) < len(node.targets) or '_base_' in names
    if isinstance(node, ast.Call):
        return not isinstance(node.func, ast.Name)
    if isinstance(node, ast.Name):
        # Any other name is unknown to a config, and ends its reading.
        return node.id.startswith('__') or (
            hasattr(builtins, node.id) and node.id not in _HARMLESS)
    if isinstance(node, ast.keyword):
        return node.arg == 'type' and _is_function(node.value)
    if isinstance(node, ast.Dict):
        return any(isinstance(key, ast.Constant) and key.value == 'type' and _is_function(value)
                   for key, value in zip(node.keys, node.values, strict=True))
    return False


def _is_function(node: ast.AST) -> bool:
    """Whether a ``type`` names something outside the registries that is no class."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    *module, name = node.value.split('.')
    if not module:
        return False
    if sys.stdlib_module_names.intersection(module):
        return True
    return not name[:1].isupper() and name not in FUNCTIONS.module_dict
