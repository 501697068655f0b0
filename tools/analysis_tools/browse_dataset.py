"""Draw samples of a dataset as a training sees them: ``spartan-mm browse``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['browse', *sys.argv[1:]]))
