"""Show where models find what they say: ``spartan-mm cam``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['cam', *sys.argv[1:]]))
