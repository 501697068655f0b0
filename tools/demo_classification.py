"""From nothing to a trained classifier: ``make demo-classification``."""
import sys

from spartan_mm.demo import ClassifierDemo, main

if __name__ == '__main__':
    sys.exit(main(ClassifierDemo))
