"""Measure effective receptive fields: ``spartan-mm receptive-field``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['receptive-field', *sys.argv[1:]]))
