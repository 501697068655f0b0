"""Convert classifiers for the authors' code: ``spartan-mm convert SRC DST --to spartan``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['convert', *sys.argv[1:], '--from', 'mm', '--to', 'spartan']))
