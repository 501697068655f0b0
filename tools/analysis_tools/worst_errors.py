"""Draw the worst errors of a detector or a classifier: ``spartan-mm errors``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['errors', *sys.argv[1:]]))
