"""Looking through a pickle before it is read: what it names, calls, fills, and how much it claims.

Nothing of it is made here. What torch reads afterwards takes no more memory than the file is large.
"""
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from math import prod
from typing import IO, Any

import torch

from ..errors import CheckpointError

# Sizes of elements by the names of storages, as far as they are more than a byte.
_ITEM_SIZES = dict(Double=8, Float=4, Half=2, Long=8, Int=4, Short=2, BFloat16=2, ComplexDouble=16,
                   ComplexFloat=8)

# What torch.save never calls with something to count: a number or a range would become memory.
_NEVER_CALLED = frozenset(f'builtins.{name}' for name in (
    'bool', 'dict', 'float', 'int', 'list', 'str', 'tuple'))
_CALLED_EMPTY = frozenset(('builtins.bytes', 'mmengine.logging.history_buffer.HistoryBuffer'))
_CALLED_WITH_CONTENT = frozenset(('builtins.bytearray', 'builtins.frozenset', 'builtins.set',
                                  'collections.Counter', 'collections.OrderedDict'))
_TENSORS = tuple(f'torch._utils._rebuild_{kind}' for kind in (
    'tensor', 'tensor_v2', 'tensor_v3', 'qtensor'))

_LITERALS = frozenset(('NONE', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE',
                       'SHORT_BINSTRING'))


class _Name(str):
    """A class or a function, by its path."""


class _Storage(tuple):
    """Number of bytes, and bytes of an element."""


class _Made:
    """What a call or a literal of several parts makes, of a class that may be known."""

    def __init__(self, name: str = '') -> None:
        self.name = name


class Scan:
    """Goes through the pickles of a file.

    Args:
        size: Of the file, in bytes.

    Attributes:
        names: All that is named.
        filled: Of these, those whose objects get entries (dict) or items (list).
        storages: Bytes, and bytes of an element, of each storage by its key.
    """

    def __init__(self, size: int) -> None:
        self.names: set[str] = set()
        self.filled: dict[str, type] = {}
        self._size = size
        self.storages: dict[str, _Storage] = {}
        self._claimed = self._expanded = 0

    def read(self, file: IO[bytes]) -> None:
        """Go through the next pickle.

        Raises:
            CheckpointError: It claims more than the file has.
            ValueError: It is no pickle, or none that torch reads.
        """
        stack, outer, memo = [], [], {}
        for operation, argument, _ in pickletools.genops(file):
            match operation.name:
                case name if name in _LITERALS:
                    stack.append(argument)
                case 'BINPUT' | 'LONG_BINPUT':
                    memo[argument] = stack[-1]
                case 'BINGET' | 'LONG_BINGET':
                    stack.append(memo[argument])
                case 'PROTO':
                    pass
                case 'STOP':
                    return
                case 'MARK':
                    outer.append(stack)
                    stack = []
                case 'GLOBAL':
                    stack.append(self._name(*argument.split(' ', 1)))
                case 'EMPTY_TUPLE':
                    stack.append(())
                case 'EMPTY_LIST' | 'EMPTY_DICT' | 'EMPTY_SET':
                    stack.append(_Made())
                case 'TUPLE':
                    items, stack = stack, outer.pop()
                    stack.append(tuple(items))
                case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                    count = int(operation.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case 'APPEND' | 'APPENDS' | 'SETITEM' | 'SETITEMS':
                    if operation.name.endswith('S'):
                        stack = outer.pop()
                    else:
                        del stack[-1 if operation.name == 'APPEND' else -2:]
                    if isinstance(stack[-1], _Made):
                        self.filled[stack[-1].name] = dict if 'SET' in operation.name else list
                case 'REDUCE' | 'NEWOBJ':
                    called, arguments = stack[-2:]
                    stack[-2:] = [self._call(called, arguments)]
                case 'BUILD':
                    del stack[-1]
                case 'BINPERSID':
                    stack[-1] = self._claim_storage(stack[-1])
                case 'NEWTRUE' | 'NEWFALSE':
                    stack.append(operation.name == 'NEWTRUE')
                case name:
                    raise ValueError(f'it holds {name}, which no checkpoint has')

    def _name(self, module: str, name: str) -> _Name:
        module, name = NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module),
                                                            name)
        self.names.add(f'{module}.{name}')
        return _Name(f'{module}.{name}')

    def _call(self, called: Any, arguments: Any) -> _Made:
        if not isinstance(called, _Name) or not isinstance(arguments, tuple):
            return _Made()
        if called == 'torch._tensor._rebuild_from_type_v2' and len(arguments) > 2:
            self._call(arguments[0], arguments[2])
        if called in _TENSORS:
            self._claim_tensor(called, arguments)
        refused = (called in _NEVER_CALLED or called in _CALLED_EMPTY and arguments
                   or called in _CALLED_WITH_CONTENT and not all(map(_is_content, arguments))
                   or called.startswith('torch.') and called.endswith(('Tensor', 'Storage')))
        if refused:
            raise CheckpointError(f'it calls {called}, which may take any amount of memory')
        return _Made(called)

    def _claim_storage(self, identity: Any) -> _Storage:
        kind, key, count = '', None, -1
        if isinstance(identity, tuple) and len(identity) >= 5:
            _, kind, key, _, count = identity[:5]
        if isinstance(key, str) and type(count) is int and count >= 0:
            name = str(kind).rpartition('.')[2].removesuffix('Storage')
            item = _ITEM_SIZES.get(name, 1)
            found = self.storages.get(key)
            if found is None:
                found = self.storages[key] = _Storage((count * item, item))
                self._claimed += count * item
            if found == (count * item, item) and self._claimed <= self._size:
                return found
        raise CheckpointError(self._refusal())

    def _claim_tensor(self, called: str, arguments: tuple) -> None:
        try:
            (size, item), offset, shape, strides = arguments[:4]
            if called.endswith('v3'):
                item = getattr(torch, arguments[6].removeprefix('torch.')).itemsize
            fits = all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))
            last = offset + sum((number - 1) * stride
                                for number, stride in zip(shape, strides, strict=True))
            fits = fits and (0 in shape or (last + 1) * item <= size)
        except (AttributeError, IndexError, TypeError, ValueError):
            fits = False
        if fits:
            # Parts of a tensor may lie in the same place; a little of that is nothing to fear.
            self._expanded += max(0, prod(shape) * item - size)
            fits = self._expanded <= max(self._size, 2**20)
        if not fits:
            raise CheckpointError(self._refusal())

    def _refusal(self) -> str:
        return f'its tensors claim more than the {self._size} bytes that it has'


def _is_content(value: Any) -> bool:
    """Whether it is in the file, item by item: text, or a literal that is filled."""
    return isinstance(value, (str, tuple)) or isinstance(value, _Made) and value.name in (
        '', '_codecs.encode')
