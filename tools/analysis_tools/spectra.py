"""Show what mixers do to frequencies: ``spartan-mm spectra``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['spectra', *sys.argv[1:]]))
