"""Commands in this process, which spares the imports."""

import pytest

from spartan_mm.cli import main


@pytest.fixture
def run_here(capfd):
    """Run a command, which has to end with a status; return what it printed."""
    def run_command(*words, status=0):
        assert main([str(word) for word in words]) == status
        return ''.join(capfd.readouterr())
    return run_command


@pytest.fixture
def fail_here(capfd):
    """Run a command, which has to fail; return its last line and the status."""
    def run_command(*words):
        try:
            status, message = main([str(word) for word in words]), ''
        except SystemExit as stopped:
            status, message = (1, stopped.code) if isinstance(stopped.code, str) else (
                stopped.code, '')
        return (capfd.readouterr().err + message).splitlines()[-1], status
    return run_command
