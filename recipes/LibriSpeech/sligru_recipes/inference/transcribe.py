"""Audio files to texts, one at a time or in batches of like durations."""

from pathlib import Path

import soundfile
import torch
from ruamel.yaml import YAML
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

EXTENSIONS = (".wav", ".flac")
# The encoder (as SpeechBrain's CRDNN does) sees padding, which can change a letter of what it makes
# of the speech before. Batches are of like lengths, so that the shortest has at most this share.
MAX_PADDING = 0.03
MIN_SECONDS = 0.1  # shorter audio is padded: pooling needs some frames


def load_recogniser(folder, device=None):
    """Load an inference folder of a CTC or seq2seq recogniser.

    Arguments
    ---------
    folder : str or Path
    device : str, optional
        Such as "cpu" or "cuda:0"; a GPU if there is one by default.

    Returns
    -------
    speechbrain.inference.ASR.EncoderASR or EncoderDecoderASR

    Raises
    ------
    FileNotFoundError
        If the folder has no inference YAML.
    """
    folder = Path(folder).resolve()
    path = folder / "hyperparams.yaml"
    keys = YAML().load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "pretrainer" not in keys:
        raise FileNotFoundError(
            f"{folder} has no inference YAML; make such a folder with export_inference.py"
        )
    inference = EncoderDecoderASR if "decoder" in keys["modules"] else EncoderASR
    return inference.from_hparams(
        source=str(folder), run_opts={"device": device} if device else None
    )


def find_audio(paths):
    """The files among `paths`, and the WAV and FLAC files below its folders.

    Raises
    ------
    FileNotFoundError
        If a path does not exist, or a folder has no such file.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
            if not found:
                raise FileNotFoundError(f"{path} holds no WAV or FLAC file")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    return files


def transcribe(recogniser, files, max_batch_length=0.0):
    """Transcribe audio files one at a time or in batches of like durations.

    Arguments
    ---------
    recogniser : EncoderASR or EncoderDecoderASR
    files : list of Path
    max_batch_length : float
        Seconds of audio in a batch, padding included; a longer file is a batch of its own. 0: each
        file is.

    Returns
    -------
    texts : dict
        File -> what was said.
    errors : dict
        File -> why it could not be read.
    """
    seconds, texts, errors = {}, {}, {}
    for file in files:
        try:
            seconds[file] = soundfile.info(file).duration
        except (OSError, soundfile.LibsndfileError) as error:
            errors[file] = _reason(error)
    with tqdm(total=len(seconds), desc="transcribing", unit="file", disable=None) as progress:
        for batch in _batches(seconds, max_batch_length):
            signals = {}
            for file in batch:
                try:
                    signals[file] = _read(file, recogniser.audio_normalizer)
                except (ValueError, soundfile.LibsndfileError) as error:
                    errors[file] = _reason(error)
            if signals:
                lengths = torch.tensor([len(signal) for signal in signals.values()])
                signal = pad_sequence(list(signals.values()), batch_first=True)
                words, _ = recogniser.transcribe_batch(signal, lengths / lengths.max())
                texts |= zip(signals, words, strict=True)
            progress.update(len(batch))
    return texts, errors


def _batches(seconds, max_batch_length):
    """Lists of files of like durations, the longest first: memory runs out early or never."""
    batch, longest = [], 0.0
    for file in sorted(seconds, key=seconds.get, reverse=True):
        full = (len(batch) + 1) * longest > max_batch_length
        if batch and (full or seconds[file] < (1 - MAX_PADDING) * longest):
            yield batch
            batch = []
        if not batch:
            longest = seconds[file]
        batch.append(file)
    if batch:
        yield batch


def _read(file, normalizer):
    """A file as float32 samples [T] at the recogniser's rate."""
    with soundfile.SoundFile(file) as audio:
        samples = audio.read(dtype="float32", always_2d=True)
        if len(samples) < audio.frames:
            raise ValueError(f"truncated: its header promises {audio.frames} samples")
        if len(samples) == 0:
            raise ValueError("it has no samples")
        signal = normalizer(torch.from_numpy(samples), audio.samplerate)
    missing = int(MIN_SECONDS * normalizer.sample_rate) - len(signal)
    return torch.nn.functional.pad(signal, (0, max(0, missing)))


def _reason(error):
    return getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
