"""Convert RT-DETR for others: ``spartan-mm convert SRC DST --to official|huggingface``."""
import sys

from spartan_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['convert', *sys.argv[1:], '--from', 'mm']))
