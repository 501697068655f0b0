"""Draw the curves of trainings side by side: ``spartan-mm curves``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['curves', *sys.argv[1:]]))
