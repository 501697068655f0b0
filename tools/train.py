"""Train a model, detector or classifier: ``spartan-mm train``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
