"""Convert RT-DETR of others, files or folders: ``spartan-mm convert SRC DST --to mm``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['convert', *sys.argv[1:], '--from', 'official', '--to', 'mm']))
