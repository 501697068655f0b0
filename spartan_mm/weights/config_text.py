"""What passes as a config inside of a checkpoint: plain data of what is registered.

mmengine runs a config of text as Python, and whatever its form, objects are built of what it names.
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

# How a dump shows the numbers that have no literal.
_NUMBERS = dict(inf=float('inf'), nan=float('nan'))


class CodeError(ValueError):
    """What a config would run or build, and must not."""


def read_text(text: str) -> dict[str, Any]:
    """Read a config of text without running it, and look through it.

    The configs that mmengine writes are assignments of literals, and this is all that passes.

    Args:
        text: A config, as ``Config.pretty_text`` gives it.

    Returns:
        What it assigns.

    Raises:
        CodeError: It does more than that, or :func:`check` refuses a value.
        SyntaxError: It is no Python at all.
        ValueError: The same.

    Example:
        >>> read_text("model = dict(type='RTDETR', test_cfg=dict(max_per_img=300))")
        {'model': {'type': 'RTDETR', 'test_cfg': {'max_per_img': 300}}}
        >>> read_text("model = dict(type='os.system', command='ls')")
        Traceback (most recent call last):
        spartan_mm.weights.config_text.CodeError: line 1: type='os.system'
    """
    # mmengine replaces these in the text before it runs it.
    if '{{' in text:
        raise CodeError("'{{', a placeholder")
    content = {}
    try:
        for statement in ast.parse(text).body:
            try:
                assigned = _read_assignment(statement)
                check(assigned)
            except CodeError as error:
                raise CodeError(f'line {statement.lineno}: {error}') from None
            content |= assigned
    except (RecursionError, MemoryError):
        raise CodeError('too deep a nesting to be looked through') from None
    return content


def check(content: Mapping[str, Any]) -> None:
    """Insist that a config names nothing but what is meant for configs.

    Objects are built from whatever ``type`` names, functions of any installed package included. A
    ``type`` with a dot in it passes if it names a class of ``torch.nn``, ``torch.optim`` or
    ``torchvision.transforms``, or what is in a registry of OpenMMLab's packages or of one that was
    imported before.

    NOTE: Modules that a config names in ``custom_imports`` are imported, wherever Python finds
    them; those of Python's own library are refused.

    Args:
        content: What the config holds, of Python's plain types.

    Raises:
        CodeError: It names something else.
    """
    try:
        for name in ('custom_imports', 'default_scope'):
            if any(map(_is_unwanted_module, _walk(content.get(name)))):
                raise CodeError(f'{name}={content[name]!r}'[:80])
        for key, value in _walk_items(content):
            if (key == 'type' and not _is_harmless_type(value)
                    or key == '_scope_' and _is_unwanted_module(value)):
                raise CodeError(f'{key}={value!r}'[:80])
    except RecursionError:
        raise CodeError('too deep a nesting to be looked through') from None


def _read_assignment(statement: ast.stmt) -> dict[str, Any]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 \
            and isinstance(statement.targets[0], ast.Name):
        name = statement.targets[0].id
        if not name.startswith('__') and name not in ('_base_', 'dict', 'set', *_NUMBERS):
            return {name: _read_value(statement.value)}
    raise _as_error(statement)


def _read_value(node: ast.expr) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id=name) if name in _NUMBERS:
            return _NUMBERS[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float())
                         | ast.Name()):
            value = _read_value(node.operand)
            return -value if isinstance(node.op, ast.USub) else value
        case ast.List() | ast.Tuple() | ast.Set():
            kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
            return kind(map(_read_value, node.elts))
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_read_value(key): _read_value(value)
                    for key, value in zip(keys, values, strict=True)}
        case ast.Call(func=ast.Name(id='set'), args=[], keywords=[]):
            return set()
        # As dumps have it where a key is no name.
        case ast.Call(func=ast.Name(id='dict'), args=[ast.Dict() as content], keywords=[]):
            return _read_value(content)
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords) if all(
                keyword.arg is not None for keyword in keywords):
            return {keyword.arg: _read_value(keyword.value) for keyword in keywords}
    raise _as_error(node)


def _as_error(node: ast.AST) -> CodeError:
    return CodeError(ast.unparse(node)[:80])


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


def _is_unwanted_module(name: Any) -> bool:
    parts = name.split('.') if isinstance(name, str) else []
    return bool(parts) and (parts[0] in sys.stdlib_module_names
                            or any(part.startswith('__') for part in parts))


def _is_harmless_type(name: Any) -> bool:
    """Whether nothing but what is meant for configs is built from a ``type``."""
    if not isinstance(name, str):
        return not isinstance(name, (list, tuple, set, Mapping, float))
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
