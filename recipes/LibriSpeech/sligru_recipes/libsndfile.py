"""What libsndfile notes of an audio file beside its samples."""

import re

# In the log of a WAV, AIFF, AU or W64 file that ends before its header says. (The size of a WAV's
# RIFF says less: sloppy writers get it wrong.)
CUT = re.compile(
    r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE
)


def find_cut(log):
    """How much audio a file promises and has, where that differs.

    Arguments
    ---------
    log : str
        `extra_info` of a soundfile.SoundFile.

    Returns
    -------
    promised, found : int
        Bytes; both 0 where nothing is noted.
    """
    cut = CUT.search(log)
    return (int(cut[1]), int(cut[2])) if cut else (0, 0)
