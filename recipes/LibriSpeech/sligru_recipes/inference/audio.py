"""Audio files to samples that a recogniser can hear, in parts that are not too long for it."""

import itertools
import os
from pathlib import Path

import soundfile
import torch

from ..libsndfile import find_cut

EXTENSIONS = (".wav", ".flac")
FULL_SCALE = 100.0  # louder than this, where 1 is full scale: damaged, or integers as floats
UNKNOWN_SIZE = 0x7F000000  # headers of streams promise as much or more
UNKNOWN_FRAMES = 2**63 - 1  # a FLAC file's, if it was written to a pipe
FRAME_SECONDS = 0.01
SHORT_PAUSE = 0.2  # s; shorter ones are within words too
LONG_PAUSE = 1.0  # s; longer ones are rare in the utterances that recognisers are trained on
PAUSE_LEVEL = 0.25  # between the quietest, 0, and the loudest, 1, in dB
# By soundfile (TypeError: of a file without header), or resampling from an absurd rate.
UNREADABLE = (MemoryError, OSError, RuntimeError, TypeError, ValueError)
SILENCE = 1e-6  # power of digital silence and its noise, relative to the loudest frame's


def find_audio(paths):
    """The files among `paths`, and the WAV and FLAC files below its folders.

    Arguments
    ---------
    paths : list of str or Path

    Returns
    -------
    files : list of Path
    errors : dict
        Path -> why there is no audio.
    """
    files, errors = [], {}
    for path in paths:
        try:
            if os.path.isdir(path):
                found = []
                for folder, _, names in os.walk(path, onerror=_raise):
                    found += [Path(folder, name) for name in names if _is_audio(name)]
                if not found:
                    raise ValueError("holds no WAV or FLAC file")
                files += sorted(found)
            else:
                os.stat(path)
                files.append(Path(path))
        except (OSError, ValueError) as error:
            errors[path] = reason(error)
    return files, errors


def _raise(error):
    raise error


def _is_audio(name):
    return name.lower().endswith(EXTENSIONS) and not name.startswith("._")  # macOS's leftovers


def read_duration(file):
    """Duration of an audio file in seconds, by its header.

    Raises
    ------
    One of UNREADABLE
    """
    _check_kind(file)
    return soundfile.info(os.fsencode(file)).duration


def _check_kind(file):
    if not file.is_file():  # to read a pipe might never end
        raise ValueError("not a file" if file.exists() else "does not exist")


def read_audio(file, normalizer):
    """Read an audio file.

    Arguments
    ---------
    file : Path
    normalizer : speechbrain.dataio.preprocess.AudioNormalizer

    Returns
    -------
    torch.Tensor
        [T] float32 at the recogniser's rate; full scale is 1.

    Raises
    ------
    One of UNREADABLE
        If it cannot be read, is truncated or empty, or has samples that are no audio.
    """
    _check_kind(file)
    with soundfile.SoundFile(os.fsencode(file)) as audio:
        if audio.frames == UNKNOWN_FRAMES:
            raise ValueError("its header does not tell its length")
        samples = audio.read(dtype="float32", always_2d=True)
        if len(samples) < audio.frames:
            raise ValueError(f"truncated: its header promises {audio.frames} samples")
        _check_size(audio.extra_info)
        rate = audio.samplerate
    if len(samples) == 0:
        raise ValueError("it has no samples")
    samples = torch.from_numpy(samples)
    loudest = samples.abs().max().item()  # NaN if one is
    if not loudest <= FULL_SCALE:
        raise ValueError(f"it has samples of {loudest:.3g}, where full scale is 1")
    return normalizer(samples, rate)


def _check_size(log):
    promised, there = find_cut(log)  # libsndfile reads what is there
    if there + 1 < promised < UNKNOWN_SIZE:  # one may be padding
        raise ValueError(f"truncated: {there} bytes where its header promises {promised}")


def cut_at_pauses(signal, sample_rate, longest):
    """Cut a recording that is too long, in its quietest places.

    Arguments
    ---------
    signal : torch.Tensor
        [T] samples.
    sample_rate : int
    longest : float
        Seconds that a part may have.

    Returns
    -------
    list of torch.Tensor
        `signal` alone if it is short enough. Else its parts in their order, without long pauses.
        None of silence, all samples zero.
    """
    if not signal.any():
        return []
    if len(signal) / sample_rate <= longest:
        return [signal]
    frame = round(FRAME_SECONDS * sample_rate)
    level = _level(signal, frame)
    quiet, loud = level.quantile(0.01), level.max()  # a moment of digital silence is no measure
    is_pause = level < quiet + PAUSE_LEVEL * (loud - quiet)
    parts = []
    for start, end in _stretches(is_pause):
        cuts = _cuts(level, start, end, max(1, int(longest / FRAME_SECONDS)))
        bounds = [frame * cut for cut in (start, *cuts, end)]
        parts += [signal[start:end] for start, end in itertools.pairwise(bounds)]
    return parts


def _level(signal, frame):
    """Mean power around each frame, in dB."""
    power = torch.nn.functional.pad(signal - signal.mean(), (0, -len(signal) % frame))
    power = power.view(-1, frame).square().mean(1)
    width = round(SHORT_PAUSE / FRAME_SECONDS) + 1  # odd: centred
    power = torch.nn.functional.avg_pool1d(
        power[None], width, stride=1, padding=width // 2, count_include_pad=False
    )[0]
    return 10 * power.clamp(min=max(SILENCE * power.max().item(), 1e-20)).log10()


def _stretches(is_pause):
    """Start and end of each stretch of sound, in frames; long pauses separate them."""
    stretches, start = [], 0
    for pause, count in zip(*torch.unique_consecutive(is_pause, return_counts=True), strict=True):
        end = start + count.item()
        if not pause:
            if stretches and start - stretches[-1][1] <= LONG_PAUSE / FRAME_SECONDS:
                stretches[-1][1] = end
            else:
                stretches.append([start, end])
        start = end
    margin = round(SHORT_PAUSE / FRAME_SECONDS)
    return [(max(0, start - margin), min(end + margin, len(is_pause))) for start, end in stretches]


def _cuts(level, start, end, longest):
    """Frames to cut at, ascending: the quietest of the middle half, and so on within the parts.

    Of equally quiet ones it is that nearest to the middle.
    """
    if end - start <= longest:
        return []
    quarter = (end - start) // 4
    first, last = start + max(1, quarter), end - quarter
    quietest = level[first:last]
    (candidates,) = torch.nonzero(quietest == quietest.min(), as_tuple=True)
    distances = (candidates - len(quietest) // 2).abs()
    cut = first + candidates[distances.argmin()].item()
    return [*_cuts(level, start, cut, longest), cut, *_cuts(level, cut, end, longest)]


def printable(name):
    """A file's name in one line, without tabs; other characters as in Python's strings."""
    return "".join(
        letter if letter.isprintable() and letter != "\\" else ascii(letter)[1:-1]
        for letter in str(name)
    )


def reason(error):
    """What an error says, without the file's name, in one line."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
