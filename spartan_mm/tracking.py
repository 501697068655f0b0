"""Objects of a video, followed from frame to frame by ByteTrack (arXiv 2110.06864)."""
import numpy as np

from .requirements import require
from .runtime import Detections

#: The least score of a detection that may continue a track; ByteTrack's own.
WEAKEST = 0.1


class Tracker:
    """Gives the detections of frame after frame the numbers of their objects.

    An object has a number from its second frame on, and keeps it while it is out of sight for less
    than a second. Classes are not compared.

    NOTE: ByteTrack's thresholds are those of its detector. Here what counts starts a track, and
    what is weaker continues one.

    Args:
        score_threshold: The least score of a detection that counts.
        rate: Frames a second.

    Raises:
        RequirementError: The package `trackers` is missing.
    """

    def __init__(self, score_threshold: float, rate: float) -> None:
        tracker = require('trackers', '2.1', 'video').ByteTrackTracker
        self._threshold = score_threshold
        self._tracker = tracker(frame_rate=rate, track_activation_threshold=score_threshold,
                                high_conf_det_threshold=score_threshold)

    def __call__(self, found: Detections) -> Detections:
        """Follow objects into the next frame.

        Args:
            found: All detections there, the weak ones too.

        Returns:
            Those that count or continue a track, with `tracks`.
        """
        found = found.above(min(WEAKEST, self._threshold))
        found.tracks = np.full(len(found.scores), -1)
        given = found.to_supervision()
        given.data['row'] = np.arange(len(given))
        tracked = self._tracker.update(given)
        if len(tracked):
            found.tracks[tracked.data['row']] = tracked.tracker_id
        return found.select((found.scores >= self._threshold) | (found.tracks >= 0))
