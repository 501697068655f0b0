"""Draw the confusion matrix of a test: ``spartan-mm confusion``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['confusion', *sys.argv[1:]]))
