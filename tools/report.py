"""Write the report of a training: ``spartan-mm report``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['report', *sys.argv[1:]]))
