"""Write a model for other runtimes: ``spartan-mm export``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['export', *sys.argv[1:]]))
