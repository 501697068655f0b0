"""Predictions beside annotations, as the tests of this folder write them."""

import numpy as np

from spartan_mm.analysis.mistakes.predictions import DetectorResults
from spartan_mm.inference import Detections


class Pictures:
    """A dataset of pictures 0.png, 1.png, ... with objects: label, box and, for a crowd, True."""

    metainfo = dict(classes=('cat', 'dog'))

    def __init__(self, images, folder):
        self.infos = [
            dict(img_id=i, img_path=f'{folder}/{i}.png', instances=[
                dict(bbox=list(box), bbox_label=label, ignore_flag=int(any(crowd)))
                for label, box, *crowd in objects])
            for i, objects in enumerate(images)]

    def __len__(self):
        return len(self.infos)

    def get_data_info(self, idx):
        return self.infos[idx]


def make_found(*found):
    """Make detections of (label, box, score)."""
    labels, boxes, scores = zip(*found, strict=True) if found else ((), (), ())
    return Detections(np.array(boxes, dtype=np.float32).reshape(-1, 4),
                      np.array(labels, dtype=int), np.array(scores, dtype=np.float32))


def make_results(objects, found, folder='.'):
    """Make results of the objects of each image and of what was found in each."""
    return DetectorResults(Pictures(objects, folder),
                           {i: make_found(*detections) for i, detections in enumerate(found)})
