"""Weights on the Hugging Face Hub, to load and to give away.

An address is ``hf://ORG/NAME``, ``hf://ORG/NAME@REVISION`` or either with ``/FILE`` behind it.
NOTE: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are huggingface_hub's own.
"""
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import responses
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import CheckpointError, UsageError
from ..requirements import require
from ..text import first_line, join

SCHEME = 'hf://'

# The suffixes of weights, those first that hold no code whatever reads them.
_SUFFIXES = ('.safetensors', '.pth')

_REPOSITORY = re.compile(r'[\w.-]+/[\w.-]+', re.ASCII)
_ADDRESS = re.compile(rf'{SCHEME}({_REPOSITORY.pattern})(?:@([^/@]+))?(?:/(.+))?', re.ASCII)

_PUBLISHED = re.compile(r'(.+)-[0-9a-f]{8}(\.\w+)')

_LOG_IN = '`hf auth login`, or HF_TOKEN in the environment'


class Address(NamedTuple):
    """Where weights lie on the Hub.

    Attributes:
        repository: ORG/NAME.
        revision: A branch, a tag or a commit; None for the newest.
        file: Its path there; None for the only weights there are.
    """

    repository: str
    revision: str | None
    file: str | None


def parse_address(text: str) -> Address:
    """Take an address apart.

    Raises:
        CheckpointError: It is none.

    Example:
        >>> parse_address('hf://me/digits@v1/digits.pth')
        Address(repository='me/digits', revision='v1', file='digits.pth')
    """
    found = _ADDRESS.fullmatch(text)
    if not found or '..' in text.split('/'):
        raise CheckpointError(f'{text} is no address on the Hugging Face Hub: write '
                              f'{SCHEME}ORG/NAME, {SCHEME}ORG/NAME@REVISION or '
                              f'{SCHEME}ORG/NAME/FILE')
    return Address(*found.groups())


def fetch(address: str) -> Path:
    """Download a file unless the cache of the Hub has it; without a network, the cache alone.

    Args:
        address: See above.

    Raises:
        CheckpointError: It is no address, leads to no weights or to several, or the Hub cannot be
            reached.
        ImportError: The package ``huggingface_hub`` is not installed.
    """
    repository, revision, file = parse_address(address)
    library = _import()
    with _explained(address, 'cannot be downloaded'):
        if file is None:
            try:
                files = library.HfApi().list_repo_files(repository, revision=revision)
            except _answers(library):
                raise
            except Exception:  # of whatever carries the request
                folder = Path(library.snapshot_download(repository, revision=revision,
                                                        local_files_only=True))
                files = [path.relative_to(folder).as_posix()
                         for path in folder.rglob('*') if path.is_file()]
            file = _choose(address, files)
        return Path(library.hf_hub_download(repository, file, revision=revision))


def check_repository(repository: str) -> None:
    """Check before long work that weights can be pushed, as far as can be told from here.

    Raises:
        UsageError: It is no name of a repository, or nobody is logged in.
        ImportError: The package ``huggingface_hub`` is not installed.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f'{repository} is no repository of the Hugging Face Hub: write ORG/NAME')
    if _import().get_token() is None:
        raise UsageError(f'{repository} cannot be written: nobody is logged in to the Hugging Face '
                         f'Hub on this machine; {_LOG_IN}, with a token that may write')


def push(files: Sequence[Path], repository: str, card: str) -> str:
    """Put published files into a repository, in one commit; it is made if there is none.

    They take the place of those of the same stem with another hash. A README.md that is there
    stays as it is.

    Args:
        files: ``STEM-<hash>.safetensors`` and the like.
        repository: ORG/NAME.
        card: The README.md of a repository that has none.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: The Hub cannot be reached or refuses.
    """
    library = _import()
    api, add = library.HfApi(), library.CommitOperationAdd
    # Eight digits may be a date, too.
    older = [f'{re.escape(found[1])}-(?!(?:19|20)[0-9]{{6}})[0-9a-f]{{8}}{re.escape(found[2])}'
             for path in files if (found := _PUBLISHED.fullmatch(path.name))]
    with _explained(repository, 'was not written'):
        api.create_repo(repository, exist_ok=True)
        there = api.list_repo_files(repository)
        changes: list[Any] = [add(path.name, path) for path in files]
        changes += [library.CommitOperationDelete(name) for name in there
                    if any(re.fullmatch(pattern, name) for pattern in older)
                    and name not in [path.name for path in files]]
        if 'README.md' not in there:
            changes.append(add('README.md', card.encode()))
        names = join(path.name for path in files)
        return api.create_commit(repository, changes, commit_message=f'Add {names}').commit_url


def _import() -> ModuleType:
    library = require('huggingface_hub', '0.25', 'hub')
    import_module('huggingface_hub.errors')
    return library


def _choose(address: str, files: Sequence[str]) -> str:
    """Choose the weights among the files of a repository."""
    for suffix in _SUFFIXES:
        weights = sorted(name for name in files if Path(name).suffix == suffix)
        if len(weights) == 1:
            return weights[0]
        if weights:
            raise CheckpointError(f'{address} has several weights: add one of them behind a slash, '
                                  f'{join(weights)}')
    raise CheckpointError(f'{address} has no weights ({" or ".join(_SUFFIXES)}) among its '
                          f'files: {join(files)}')


def _answers(library: ModuleType) -> tuple[type[Exception], ...]:
    """What the Hub itself says no by."""
    errors = library.errors
    return (errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
            errors.EntryNotFoundError, errors.HFValidationError)


def _find_status(library: ModuleType, error: BaseException | None) -> int | None:
    """Find the status, below 500, by which the Hub refused, behind an error."""
    while error is not None:
        answer = getattr(error, 'response', None)
        if isinstance(error, library.errors.HfHubHTTPError) and answer is not None:
            return answer.status_code if answer.status_code < 500 else None
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _explained(name: str, failed: str) -> Iterator[None]:
    """Say in a sentence what is wrong, in place of huggingface_hub's errors."""
    library = _import()
    errors = library.errors
    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        reason = f'it asks to accept its terms first, on its page, and to log in: {_LOG_IN}'
        raise CheckpointError(f'{name} {failed}: {reason}') from error
    except errors.RepositoryNotFoundError as error:
        reason = ('there is no such repository, or it is not open to '
                  + ('whoever the token belongs to' if library.get_token() else
                     f'who is not logged in: {_LOG_IN}'))
        raise CheckpointError(f'{name} {failed}: {reason}') from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f'{name} {failed}: the repository has no such revision') from error
    except errors.LocalEntryNotFoundError as error:
        if status := _find_status(library, error):
            raise CheckpointError(
                f'{name} {failed}: the Hugging Face Hub answers {status} '
                f'{responses.get(status, "")}, and the cache of this machine does not have it; try '
                f'again later, or log in: {_LOG_IN}') from error
        raise CheckpointError(
            f'{name} {failed}: the Hugging Face Hub cannot be reached from here, and the cache of '
            'this machine does not have it; connect, or copy the file here and give its path'
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f'{name} {failed}: the repository has no such file') from error
    except Exception as error:  # of whatever carries the requests
        raise CheckpointError(f'{name} {failed}: {first_line(error)}') from error
