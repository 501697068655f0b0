"""Measure time and memory of models and their forms: ``spartan-mm benchmark``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['benchmark', *sys.argv[1:]]))
