"""Write a checkpoint in the form for inference: ``spartan-mm deploy``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['deploy', *sys.argv[1:]]))
