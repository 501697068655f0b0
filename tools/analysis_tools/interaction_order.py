"""Measure interactions of patches by their order: ``spartan-mm interactions``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['interactions', *sys.argv[1:]]))
