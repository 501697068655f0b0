"""Detect objects in images and videos, or classify them: ``spartan-mm infer``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['infer', *sys.argv[1:]]))
