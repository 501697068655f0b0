"""mmengine's ways to a checkpoint, and with them those of all that loads through mmengine."""
import re
from typing import Any

from mmengine.runner import checkpoint as module

from ..errors import CheckpointError
from . import hub
from .safe_load import local_file, read_checkpoint
from .stored_config import find_problem, give_text, text_places


def read_checkpoints_safely() -> None:
    """Have mmengine, and all that loads through it, read checkpoints without running code in them.

    The onedl builds of mmengine unpickle whatever torch refuses to read as weights; the original
    cannot resume from its own checkpoints; both unpickle what they download. Here
    :func:`read_checkpoint` reads for both, safetensors files, too.
    """
    loader = module.CheckpointLoader
    loader.register_scheme('', load_from_local, force=True)
    loader.register_scheme(['http://', 'https://', hub.SCHEME], load_from_http, force=True)
    # Loaders of other schemes call it by name: open-mmlab://, torchvision://, mmcls://.
    module.load_from_http = load_from_http
    # Two stores in which no public model lies.
    others = [scheme for scheme in loader._schemes
              if any(store in scheme for store in ('s3://', 'petrel://', 'pavi://'))]
    loader.register_scheme(others, refuse_scheme, force=True)


# mmengine's log says what follows 'load_from_' in these names.

def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read a file, in the place of mmengine's function.

    Who asks may go on to run the config in it, as mmengine's inferencers do, or to ignore it, as
    resuming and testing do. A config that is plain data is written as text for them; text that
    would run code is replaced by text that says so when it is run.
    """
    checkpoint = read_checkpoint(filename, map_location)
    give_text(checkpoint)
    for place, key in text_places(checkpoint):
        problem = find_problem(place[key], filename)
        if problem:
            # mmengine replaces what stands in two braces, even within a string.
            message = re.sub('[{}]', '', ascii(problem))
            place[key] = f'raise RuntimeError({message})'
    return checkpoint


def load_from_http(filename: str, map_location: Any = None, *_: Any, **__: Any) -> Any:
    """Download a file unless that was done before, and read it, in the place of mmengine's."""
    return load_from_local(str(local_file(filename)), map_location)


def refuse_scheme(filename: str, map_location: Any = None) -> None:
    """Refuse an address whose content mmengine would unpickle unchecked."""
    raise CheckpointError(f'{filename} is refused: checkpoints are read safely from files and from '
                          'http(s) or hf:// alone; download it and give the path')
