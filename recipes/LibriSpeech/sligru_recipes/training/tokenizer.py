"""Subword tokens: training, loading, and whether they fit the transcripts."""

import os
import re
import shutil
import tempfile
from itertools import pairwise

import sentencepiece
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.logger import get_logger

from ..files import replacing

logger = get_logger(__name__)

# A few transcripts with too many tokens for their audio are wrong data, more are a wrong setting.
MAX_UNALIGNABLE = 0.01
TOKENIZER_OF = "take the tokenizer of a seq2seq recogniser or of a language model"
QUIET = 2  # SentencePiece's log level: errors alone


def load_tokenizer(hparams, text_file=None):
    """Train the tokenizer, or load it if that was done before or `tokenizer_file` is given.

    A YAML that has `bos_index` and `eos_index` gets a tokenizer with these two tokens.

    Arguments
    ---------
    hparams : dict
    text_file : str, optional
        To train on, a sentence a line; the transcripts of `train_csv` by default.

    Returns
    -------
    speechbrain.tokenizers.SentencePiece.SentencePiece
        Of at most `vocab_size` tokens: as many as the text can fill. A given one has its own size.

    Raises
    ------
    ValueError
        If `vocab_size` is smaller than the number of characters, or a tokenizer does not fit (see
        `check_tokenizer`).
    """
    folder, token_type = hparams["save_folder"], hparams["token_type"]

    def name(size):
        return os.path.join(folder, f"{size}_{token_type}.model")

    def adopt(path):
        size = check_tokenizer(path, hparams, f"tokenizer_file {path}")
        with replacing(name(size)) as partial:
            shutil.copyfile(path, partial)
        return size

    def train(size):
        if os.path.isfile(name(size)):
            check_tokenizer(name(size), hparams, f"the run's tokenizer {name(size)}")
            return size
        # SentencePiece takes no spaces in its paths, which save_folder may have.
        with tempfile.TemporaryDirectory() as scratch:
            source = {"annotation_train": hparams["train_csv"], "annotation_read": "wrd"}
            if text_file is not None:
                source = {"text_file": os.path.join(scratch, "train.txt")}
                os.symlink(os.path.abspath(text_file), source["text_file"])
            try:
                SentencePiece(
                    model_dir=scratch,
                    vocab_size=size,
                    model_type=token_type,
                    character_coverage=hparams["character_coverage"],
                    bos_id=hparams.get("bos_index", -1),
                    eos_id=hparams.get("eos_index", -1),
                    **source,
                )
            except RuntimeError as error:  # the limit is told only in this message
                limit = re.search(r"too high .* value <= (\d+)", str(error))
                if limit is None:
                    raise ValueError(f"vocab_size {size} is impossible: {error}") from error
                logger.warning(
                    f"vocab_size {size} is more than the train transcripts can fill; "
                    f"using the most they can, {limit[1]}"
                )
                return train(int(limit[1]))
            trained = os.path.join(scratch, os.path.basename(name(size)))
            check_tokenizer(trained, hparams, "the new tokenizer")
            with replacing(name(size)) as partial:
                shutil.copyfile(trained, partial)
        return size

    sentencepiece.set_min_log_level(QUIET)
    given = hparams["tokenizer_file"]
    size = main_process_only(adopt if given else train)(given or hparams["vocab_size"])
    return SentencePiece(model_dir=folder, vocab_size=size, model_type=token_type)


def check_tokenizer(path, keys, title):
    """Check that a tokenizer fits the keys of a YAML; returns its number of tokens.

    Raises
    ------
    ValueError
        If it is damaged, or its unknown token (the blank), bos or eos are not those of the YAML.
        The message calls it `title`.
    """
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:  # such as "unk is not defined" of an empty file
        raise ValueError(f"{title} is damaged, or no SentencePiece model") from error
    for key, index, hint in (
        ("blank_index", tokenizer.unk_id(), "the blank is the unknown token"),
        ("bos_index", tokenizer.bos_id(), TOKENIZER_OF),
        ("eos_index", tokenizer.eos_id(), TOKENIZER_OF),
    ):
        if keys.get(key, index) != index:
            raise ValueError(f"{title} has {key} {index}, the YAML has {key} {keys[key]}: {hint}")
    return tokenizer.vocab_size()


def encode(tokenizer, text):
    """The tokens of a text, without the unknown one: nothing can be learnt of it.

    For CTC it would even be the blank.
    """
    unknown = tokenizer.sp.unk_id()
    return [token for token in tokenizer.sp.encode_as_ids(text) if token != unknown]


def check_characters(source, sentences, tokenizer, strict):
    """Tell of characters that the tokenizer does not know.

    Arguments
    ---------
    source : str
        The file that they are from.
    sentences : iterable of (str, str)
        Name of the sentence (in the message) and its text.
    tokenizer : SentencePiece
    strict : bool
        Whether it should know all. Otherwise a warning says that they count as errors.

    Raises
    ------
    ValueError
        If it should, but does not.
    """
    known, unknown, first, count = set(), set(), None, 0
    for name, text in sentences:
        for character in set(text) - known - unknown:
            tokens = tokenizer.sp.encode_as_ids(character)
            (unknown if tokenizer.sp.unk_id() in tokens else known).add(character)
        found = unknown.intersection(text)
        if found and strict:
            raise ValueError(
                f"{source}: {name} has the character {min(found)!r}, "
                "which the tokenizer does not know"
            )
        if found:
            first = first or name
            count += 1
    if count:
        logger.warning(
            f"{source}: {count} transcripts (such as {first}) have "
            f"{', '.join(map(repr, sorted(unknown)))}, which the tokenizer does not know: each is "
            "left out of what is learnt, and counts as an error in a WER"
        )


def check_alignable(dataset, tokenizer, frames_per_second):
    """Check that CTC can align each transcript with its audio.

    Arguments
    ---------
    dataset : DynamicItemDataset
        With `duration` (s) and `wrd`.
    tokenizer : SentencePiece
    frames_per_second : float
        Of the encoder's output.

    Raises
    ------
    ValueError
        If more than 1 % of the transcripts have more tokens than the encoder has frames: CTC
        would silently learn nothing from them. Fewer are logged.
    """
    impossible = []
    for utterance, row in dataset.data.items():
        tokens = encode(tokenizer, row["wrd"])
        # Equal neighbours need a blank between them.
        needed = len(tokens) + sum(a == b for a, b in pairwise(tokens))
        if needed > row["duration"] * frames_per_second:
            impossible.append(utterance)
    if impossible:
        message = (
            f"{len(impossible)} of {len(dataset)} train utterances (such as {impossible[0]}) have "
            f"more tokens than encoder frames ({frames_per_second:g} per second): CTC cannot "
            "learn from them. A smaller time_pooling_size or a larger vocab_size helps."
        )
        if len(impossible) > MAX_UNALIGNABLE * len(dataset):
            raise ValueError(message)
        logger.warning(message)
