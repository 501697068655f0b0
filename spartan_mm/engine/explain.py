"""What other packages say of a fault in a config, in a line."""

import re
import traceback

from mmengine.registry import build_from_cfg

from ..text import first_line


def explain(error: BaseException) -> str | None:
    """Say in a line what is wrong with a config; None if the error is none of these.

    - A registry has no such name, or there is no ``type``.
    - A class does not take an argument that the config gives, or lacks one.
    """
    said = first_line(Exception(*error.args[:1])).partition('. Please check')[0]
    while error.__context__ is not None:
        error = error.__context__  # mmengine may raise a new error for that of a class
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    building = [frame for frame in frames if frame.f_code is build_from_cfg.__code__]
    if building and isinstance(error, KeyError | TypeError):
        # A class may hand on what it is given to the classes it is made of.
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'",
                            str(error))
        known = {base.__name__ for base in getattr(building[-1].f_locals.get('obj_cls'),
                                                   '__mro__', ())}
        if building[-1] is frames[-1] or (unknown is not None and unknown[1] in known
                                          and unknown[2] in building[-1].f_locals['args']):
            return f'what the config says cannot be built: {said}'
    return None
