"""SpeechBrain's CTC scorer, its loops over frames and hypotheses replaced by compiled operators.

The class is SpeechBrain's, subclassed: constructor and interface are inherited, so that its
searchers and `ScorerBuilder` take it as it is. Replaced is what it keeps and computes in a search:

===========================  ===============================  ===================================
step                         SpeechBrain                      here
===========================  ===============================  ===================================
scores of the next tokens    forward probabilities of every   ``ops.ctc_prefix_scores``, a sum
                             candidate, an operator a frame;  over frames; nothing of a candidate
                             indexed writes a hypothesis      is kept
state of the hypotheses      gathered from those of all       ``ops.ctc_prefix_extend``, computed
that the search goes on      candidates                       for the chosen ones alone
with
===========================  ===============================  ===================================

The host waits for the GPU nowhere. Source: Watanabe et al. 2017, Algorithm 2 (hybrid CTC/attention
architecture for end-to-end speech recognition).
"""

import torch

from . import ops
from ._stock import scorer as stock
from .reference import LOG_ZERO

__all__ = ["CTCScorer", "build"]


class CTCScorer(stock.CTCScorer):
    """CTC scores for a search, a replacement of :class:`speechbrain.decoders.scorer.CTCScorer`.

    Arguments are SpeechBrain's, and so are the scores, with these exceptions: no utterance need
    fill the batch's frames, utterances may have no frame, and hypotheses more tokens than frames;
    what is beyond an utterance's end never counts, whatever `blank_index` is; and if a search goes
    on with a token that was no candidate, its state is its own and not that of another.

    With `ctc_window_size` the frames that count depend on all utterances of a batch, as in
    SpeechBrain.

    Example
    -------
    >>> from speechbrain.nnet.linear import Linear
    >>> scorer = CTCScorer(Linear(input_size=6, n_neurons=5), blank_index=0, eos_index=2)
    >>> scorer.reset_mem(torch.rand(1, 10, 6), torch.tensor([7]))
    >>> bos, candidates = torch.tensor([1, 1]), torch.tensor([[3, 4], [4, 2]])
    >>> scores, memory = scorer.score(bos, None, candidates, None)
    >>> scores.shape
    torch.Size([2, 5])
    >>> memory = scorer.permute_mem(memory, torch.tensor([[3, 5 + 4]]))
    """

    def __init__(self, ctc_fc, blank_index, eos_index, ctc_window_size=0):
        if not isinstance(ctc_window_size, int) or ctc_window_size < 0:
            raise ValueError(
                f"ctc_window_size must be an int from 0 on, but is {ctc_window_size!r}"
            )
        super().__init__(ctc_fc, blank_index, eos_index, ctc_window_size)

    def choose_backend(self, device):
        """The backend that serves the scores now, and why.

        Arguments
        ---------
        device : torch.device or str
            Of the encoder's states.

        Returns
        -------
        name : str
            "cpu", "cuda" (or what is forced), or "reference": plain PyTorch.
        reason : str
            One clause, for people.

        Raises
        ------
        RuntimeError
            If a backend is forced that cannot serve it.
        """
        return ops.choose_ctc_prefix_backend(device)

    @torch.no_grad()
    def reset_mem(self, x, enc_lens):
        """Begin the search of a batch.

        Arguments
        ---------
        x : torch.Tensor
            Encoder states, [B, T, features].
        enc_lens : torch.Tensor
            [B], integers: the frames of each utterance that count. More than T are T.

        Raises
        ------
        ValueError
            If the shapes do not fit, or an index is not one of a token.
        """
        log_probs = self.softmax(self.ctc_fc(x))  # float32, whatever the layer gives
        log_probs = log_probs.transpose(1, 2).contiguous()
        self.ctc_score = _PrefixScore(
            log_probs, enc_lens, self.blank_index, self.eos_index, self.ctc_window_size
        )


class _PrefixScore:
    """The search of a batch; what SpeechBrain's scorer calls, as its ``CTCPrefixScore``.

    Its memory is, after a step, the state of the hypotheses, the log-probabilities of all that
    begins with them and a token (psi), their last tokens and the window; after a permutation, the
    state and psi [N, 1] of the chosen.
    """

    minus_inf = LOG_ZERO  # SpeechBrain's ScorerBuilder reads it

    def __init__(self, log_probs, enc_lens, blank_index, eos_index, ctc_window_size):
        batch, vocabulary, _ = log_probs.shape
        if enc_lens.shape != (batch,) or enc_lens.is_floating_point():
            raise ValueError(
                f"enc_lens must be {batch} integers, frames of each utterance, but is "
                f"{str(enc_lens.dtype)[6:]} of shape {list(enc_lens.shape)}"
            )
        self.log_probs = log_probs
        self.lengths = enc_lens.to(log_probs.device, torch.int64)
        self.blank_index = _checked("blank_index", blank_index, vocabulary)
        self.eos_index = _checked("eos_index", eos_index, vocabulary)
        self.ctc_window_size = ctc_window_size

    @torch.no_grad()
    def forward_step(self, inp_tokens, states, candidates=None, attn=None):
        """Score what may follow; see `CTCScorer.score`."""
        if states is None:
            beam = self._beam(inp_tokens.shape[0])
            utterances = torch.arange(len(self.log_probs), device=self.log_probs.device)
            self.first = (utterances * beam)[:, None]  # hypothesis of each
            states = ops.ctc_prefix_start(self.log_probs, self.blank_index, beam), 0.0
        state, psi_before = states
        window = self._window(attn)
        psi = ops.ctc_prefix_scores(
            self.log_probs,
            self.lengths,
            state,
            inp_tokens,
            candidates,
            window,
            blank_index=self.blank_index,
            eos_index=self.eos_index,
        )
        return psi - psi_before, (state, psi, inp_tokens, window)

    @torch.no_grad()
    def permute_mem(self, memory, index):
        """Go on with what the search has chosen; see `CTCScorer.permute_mem`."""
        state, psi, last_tokens, window = memory
        vocabulary = self.log_probs.shape[1]
        parents = index.div(vocabulary, rounding_mode="floor").add_(self.first)
        chosen = psi.view(len(self.log_probs), -1).gather(1, index)
        state = ops.ctc_prefix_extend(
            self.log_probs,
            self.lengths,
            state,
            last_tokens,
            parents.flatten(),
            (index % vocabulary).flatten(),
            window,
            blank_index=self.blank_index,
        )
        return state, chosen.view(-1, 1)

    def _beam(self, hypotheses):
        batch = len(self.log_probs)
        if batch == 0 or hypotheses % batch:
            raise ValueError(
                f"inp_tokens must be a multiple of {batch}, the utterances, but are {hypotheses}"
            )
        return hypotheses // batch

    def _window(self, attn):
        """The frames around the peaks of the attention, [2], or None for all frames."""
        if self.ctc_window_size == 0 or attn is None:
            return None
        peaks = torch.max(attn, dim=1).indices
        return torch.stack([peaks.min() - self.ctc_window_size, peaks.max() + self.ctc_window_size])


def _checked(name, index, vocabulary):
    """An index of a token, counted from the end if it is negative, as an int from 0 on."""
    if not isinstance(index, int) or not -vocabulary <= index < vocabulary:
        raise ValueError(f"{name} must be an int below {vocabulary}, but is {index!r}")
    return index % vocabulary


def build(ctc_scorer_class, **arguments):
    """Build a CTC scorer of a class that a YAML has under a key of its own.

    Arguments
    ---------
    ctc_scorer_class : type
        :class:`CTCScorer`, or SpeechBrain's.
    **arguments
        Of its constructor.

    Returns
    -------
    speechbrain.decoders.scorer.BaseScorerInterface

    Raises
    ------
    ValueError
        If `ctc_scorer_class` is not a class of scorers.

    Example
    -------
    >>> build(CTCScorer, ctc_fc=torch.nn.Identity(), blank_index=0, eos_index=2).eos_index
    2
    """
    is_scorer = isinstance(ctc_scorer_class, type) and issubclass(
        ctc_scorer_class, stock.BaseScorerInterface
    )
    if not is_scorer:
        raise ValueError(
            f"ctc_scorer_class must be a class of scorers, but is {ctc_scorer_class!r}"
        )
    return ctc_scorer_class(**arguments)
