"""What this package builds on and may find missing or too old."""
import importlib
from types import ModuleType

from packaging.version import InvalidVersion, Version

from .errors import ExplainedError


class RequirementError(ExplainedError, ImportError):
    """A package that is missing, too old, or refuses another one."""


def require(import_name: str, minimum: str, extra: str) -> ModuleType:
    """Import a package this one builds on, or say in one sentence what is missing or too old.

    The check goes by import name, because two families of distributions provide the same modules:
    the original ``mmengine``, ``mmcv``, ``mmdet`` and ``mmpretrain``, and the maintained
    ``onedl-*`` builds.

    Args:
        import_name: The module to import, such as ``'mmdet'``.
        minimum: The oldest version that works.
        extra: The extra of this package that installs it.

    Returns:
        The imported module.

    Raises:
        RequirementError: The package is missing, too old, or refuses another package's version.

    Example:
        >>> require('mmengine', '0.10.0', 'backbone').__name__
        'mmengine'
        >>> require('mmengine', '99.0', 'backbone')
        Traceback (most recent call last):
            ...
        spartan_mm.requirements.RequirementError: spartan_mm needs mmengine >= 99.0, but ...
    """
    needed = f'spartan_mm needs {import_name}'
    remedy = f"`pip install 'spartan_mm[{extra}]'` or your own choice of {import_name} >= {minimum}"
    try:
        module = importlib.import_module(import_name)
    except ModuleNotFoundError as error:
        if error.name != import_name:
            raise RequirementError(f'{needed}, which is installed but cannot be imported because '
                                   f'it needs {error.name}; install that, too') from error
        raise RequirementError(f'{needed} >= {minimum}, which is not installed; install it with '
                               f'{remedy}') from error
    except AssertionError as error:
        # mmdet 3.3 and mmpretrain 1.2 assert the range of mmcv and mmengine versions on import.
        raise RequirementError(f'{needed}, which is installed but refuses another package: {error}'
                               ) from error

    found = getattr(module, '__version__', None)
    try:
        too_old = Version(found) < Version(minimum)
    except (InvalidVersion, TypeError):
        # A source checkout may carry a version nobody can compare: let it try.
        too_old = False
    if too_old:
        raise RequirementError(f'{needed} >= {minimum}, but {found} is installed; update it with '
                               f'{remedy}')
    return module
