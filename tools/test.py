"""Evaluate a checkpoint, detector or classifier: ``spartan-mm test``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['test', *sys.argv[1:]]))
