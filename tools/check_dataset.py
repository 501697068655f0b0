"""Check the datasets of a config before a long run: ``spartan-mm check-data``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['check-data', *sys.argv[1:]]))
