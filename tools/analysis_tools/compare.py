"""Compare models, as table, CSV and plot: ``spartan-mm compare``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['compare', *sys.argv[1:]]))
