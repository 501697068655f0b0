"""Leave out of a trained model what matters least: ``spartan-mm prune``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['prune', *sys.argv[1:]]))
