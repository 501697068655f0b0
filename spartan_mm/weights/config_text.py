"""What passes as a config inside of a checkpoint: plain data of what is registered.

As text a config is run as Python, and whatever its form, objects are built of what it names.
"""
import ast
import sys
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import mmengine.registry
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

# OpenMMLab's packages: a name in one of them may be imported to see what it is.
_SCOPES = frozenset((
    'mmaction', 'mmagic', 'mmcls', 'mmcv', 'mmdet', 'mmdet3d', 'mmedit', 'mmengine', 'mmocr',
    'mmpose', 'mmpretrain', 'mmrazor', 'mmrotate', 'mmseg', 'mmselfsup', 'mmtrack', 'mmyolo',
    'spartan_mm'))

# Of these, classes may be named by their path.
_LIBRARIES = ('torch.nn.', 'torch.optim.', 'torchvision.transforms.')

# How a dump shows the numbers that have no literal; no config can be read that has them.
_NUMBERS = ('inf', 'nan')


def find_code(text: str) -> str | None:
    """Look for what a config would run beyond assigning values.

    mmengine takes the config of a checkpoint for Python and runs it, and builds objects from
    whatever ``type`` names, functions of any installed package included. The configs that it writes
    are assignments of literals, and this is all that passes. A ``type`` with a dot in it passes if
    it names a class of ``torch.nn``, ``torch.optim`` or ``torchvision.transforms``, or what is in a
    registry of OpenMMLab's packages or of one that was imported before.

    NOTE: modules that a config names in ``custom_imports`` are imported, wherever Python finds
    them; those of Python's own library are refused.

    Args:
        text: A config, as ``Config.pretty_text`` gives it.

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
        for statement in ast.parse(text).body:
            for node in _suspects(statement):
                return f'line {node.lineno}: {ast.unparse(node)[:80]}'
    except (SyntaxError, ValueError):
        return None
    except (RecursionError, MemoryError):
        return 'too deep a nesting to be looked through'
    return None


def find_code_in_data(content: Mapping[str, Any]) -> str | None:
    """Look for what a config that is no text would run, or build of what is not registered.

    What passes as a ``type``, and what as a module, is said of :func:`find_code`.

    Args:
        content: What the config holds, of Python's plain types.

    Returns:
        The first suspect part; None if there is none.

    Example:
        >>> find_code_in_data(dict(model=dict(type='os.system', command='ls')))
        "type='os.system'"
    """
    try:
        for name in ('custom_imports', 'default_scope'):
            if any(map(_is_unwanted_module, _walk(content.get(name)))):
                return f'{name}={content[name]!r}'[:80]
        for key, value in _walk_items(content):
            if key == 'type' and (isinstance(value, (list, tuple, set, Mapping))
                                  or not _is_harmless_type(value)) \
                    or key == '_scope_' and _is_unwanted_module(value):
                return f'{key}={value!r}'[:80]
    except RecursionError:
        return 'too deep a nesting to be looked through'
    return None


def _walk(value: Any) -> Iterator[Any]:
    """Go through a value and all that is in it."""
    yield value
    parts = value if isinstance(value, (list, tuple, set)) else ()
    for part in [*value, *value.values()] if isinstance(value, Mapping) else parts:
        yield from _walk(part)


def _walk_items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Go through the entries of all dicts in a value."""
    for part in _walk(value):
        if isinstance(part, Mapping):
            yield from part.items()


def _suspects(statement: ast.stmt) -> Iterator[ast.AST]:
    """Go through all that is no assignment of plain data."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) > 1 \
            or not isinstance(statement.targets[0], ast.Name):
        yield statement
        return
    name = statement.targets[0].id
    if name.startswith('__') or name in ('_base_', 'dict', 'set', *_NUMBERS):
        yield statement
    yield from _suspect_values(statement.value)
    # Both name modules that mmengine imports.
    if name in ('custom_imports', 'default_scope'):
        for node in ast.walk(statement.value):
            if isinstance(node, ast.Constant) and _is_unwanted_module(node.value):
                yield statement


def _suspect_values(node: ast.expr) -> Iterator[ast.AST]:
    if isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id in _NUMBERS):
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        yield from _suspect_values(node.operand)
    elif isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        for item in node.elts:
            yield from _suspect_values(item)
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield from _suspect_items(key, key.value, value)
            # A number below zero.
            elif isinstance(key, ast.UnaryOp):
                yield from _suspect_values(key)
                yield from _suspect_values(value)
            else:
                yield node
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) \
            and node.func.id in ('dict', 'set') and _is_plain_call(node):
        for part in node.args:
            yield from _suspect_values(part)
        for part in node.keywords:
            yield from _suspect_items(part, part.arg, part.value)
    else:
        yield node


def _is_plain_call(node: ast.Call) -> bool:
    """Whether it is ``set()`` or ``dict(a=1)``, or ``dict({'a b': 1})``, as dumps have it."""
    if node.func.id == 'set':
        return not node.args and not node.keywords
    if node.args:
        return len(node.args) == 1 and isinstance(node.args[0], ast.Dict) and not node.keywords
    return all(keyword.arg is not None for keyword in node.keywords)


def _suspect_items(shown: ast.AST, key: Any, value: ast.expr) -> Iterator[ast.AST]:
    yield from _suspect_values(value)
    if key not in ('type', '_scope_'):
        return
    known = isinstance(value, ast.Constant) and (
        _is_harmless_type(value.value) if key == 'type' else not _is_unwanted_module(value.value))
    if not known:
        yield ast.copy_location(ast.keyword(key, value), shown)


def _is_unwanted_module(name: Any) -> bool:
    parts = name.split('.') if isinstance(name, str) else []
    return bool(parts) and (parts[0] in sys.stdlib_module_names
                            or any(part.startswith('__') for part in parts))


def _is_harmless_type(name: Any) -> bool:
    """Whether nothing but what is meant for configs is built from a ``type``."""
    if not isinstance(name, str):
        return True
    if any(name in registry.module_dict for registry in _registries()):
        return True
    if _is_unwanted_module(name):
        return False
    package, _, rest = name.partition('.')
    # mmengine would import a module of this name, and cannot call it.
    if not rest:
        return True
    if name.startswith(_LIBRARIES):
        return _is_class_of_library(name)

    if package in _SCOPES or package in {registry.scope for registry in _registries()}:
        try:
            found = get_object_from_string(name)
        except Exception:  # whatever keeps a package from being imported
            found = None
        if found is None:
            # A name after a scope, which is looked up in the registries alone.
            return '.' not in rest
        # The import may have filled the registries.
        return any(found is item for item in _registered())
    return any(name == f'{item.__module__}.{item.__qualname__}' for item in _registered()
               if isinstance(item, (type, FunctionType)))


def _is_class_of_library(name: str) -> bool:
    try:
        found = get_object_from_string(name)
    except Exception:  # whatever keeps a package from being imported
        return False
    return isinstance(found, type) and f'{found.__module__}.'.startswith(_LIBRARIES)


def _registries() -> Iterator[Registry]:
    """Go through mmengine's registries and those that other packages derived from them."""
    waiting = [item for item in vars(mmengine.registry).values() if isinstance(item, Registry)
               # What a whole training is built by has no place inside of a config.
               and item is not mmengine.registry.RUNNERS]
    while waiting:
        registry = waiting.pop()
        yield registry
        waiting.extend(registry.children.values())


def _registered() -> Iterator[Any]:
    for registry in _registries():
        yield from registry.module_dict.values()
