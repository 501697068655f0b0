"""From nothing to a trained detector: ``make demo``, see :class:`spartan_mm.demo.DetectorDemo`."""
import sys

from spartan_mm.demo import DetectorDemo, main

if __name__ == '__main__':
    sys.exit(main(DetectorDemo))
