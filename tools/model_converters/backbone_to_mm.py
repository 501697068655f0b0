"""Convert other authors' backbones: ``spartan-mm convert backbone NAME SRC DST``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['convert', 'backbone', *sys.argv[1:]]))
