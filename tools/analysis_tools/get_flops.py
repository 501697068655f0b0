"""Count parameters and operations: ``spartan-mm flops``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['flops', *sys.argv[1:]]))
