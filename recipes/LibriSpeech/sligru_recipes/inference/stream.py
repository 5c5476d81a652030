"""The text of speech that is still being spoken, by a CTC recogniser that hears no future."""

import torch
from speechbrain.inference.ASR import EncoderASR

from sb_fast_sligru import StreamingEncoder

from .audio import UNREADABLE, read_audio, reason
from .frames import shortest_signal
from .transcribe import Transcript


class StreamingTranscriber:
    """Transcribes chunk by chunk, to the text of one pass over the whole.

    Arguments
    ---------
    recogniser : EncoderASR
        Trained by hparams/librispeech_ctc_streaming.yaml, or another that decodes greedily and that
        :class:`sb_fast_sligru.StreamingEncoder` takes.

    Attributes
    ----------
    encoder : StreamingEncoder
        Tells how many samples a state has, and how late it comes.

    Raises
    ------
    ValueError
        If the recogniser cannot hear a stream.
    """

    def __init__(self, recogniser):
        try:
            if not isinstance(recogniser, EncoderASR):
                raise ValueError("its decoder attends to whole utterances")
            self.encoder = StreamingEncoder(recogniser.mods.encoder)
        except ValueError as error:
            raise ValueError(f"this recogniser cannot hear a stream: {error}") from error
        self.recogniser = recogniser

    def transcribe(self, chunks):
        """Transcribe a stream.

        Arguments
        ---------
        chunks : iterable of torch.Tensor
            [samples] each, at the recogniser's rate; full scale is 1. Chunks of
            ``encoder.stride`` samples give each letter as early as can be.

        Yields
        ------
        str
            What each chunk adds to the text, may be empty; then what the end adds.
        """
        context = self.encoder.make_streaming_context()
        spell = self.recogniser.tokenizer.decode_ids
        last = None  # state, whose token may go on
        spoken = []  # tokens with letters; before any, SentencePiece leaves out spaces
        for chunk, is_last in self._until_the_end(chunks, context):
            chunk = chunk.unsqueeze(0).to(self.recogniser.device)
            states = self.encoder(chunk, context, is_last)
            if last is not None:
                states = torch.cat([last, states], 1)
            tokens = self._decode(states)[len(self._decode(last)) :]
            yield spell(spoken + tokens)[len(spell(spoken)) :]
            last = states[:, -1:]
            if spell(tokens):
                spoken = tokens

    def transcribe_files(self, files):
        """Transcribe audio files, each in chunks of one state.

        Arguments
        ---------
        files : list of Path

        Yields
        ------
        Transcript
            Whose pieces must be read before the next one's.
        """
        normalizer = self.recogniser.audio_normalizer
        for file in files:
            try:
                signal = read_audio(file, normalizer)
            except UNREADABLE as error:
                yield Transcript(file, error=reason(error))
                continue
            seconds = len(signal) / normalizer.sample_rate
            chunks = signal.split(self.encoder.stride)
            # Silence, all samples zero, has no text.
            pieces = self.transcribe(chunks) if signal.any() else iter([])
            yield Transcript(file, pieces, seconds=seconds)

    def _until_the_end(self, chunks, context):
        """Chunks, and whether each is the last, which has what a signal lacks of the shortest."""
        for chunk in chunks:
            yield chunk, False
        yield torch.zeros(max(0, shortest_signal(self.recogniser) - context.samples)), True

    def _decode(self, states):
        """Token IDs of states, [1, T, tokens] or None."""
        if states is None:
            return []
        return self.recogniser.decoding_function(states, torch.ones(1))[0]
