"""Run a batch once more that stopped a training: ``spartan-mm replay``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['replay', *sys.argv[1:]]))
