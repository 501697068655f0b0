"""Make a checkpoint fit to be given away: ``spartan-mm publish``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['publish', *sys.argv[1:]]))
