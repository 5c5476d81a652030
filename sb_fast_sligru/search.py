"""SpeechBrain's searches with an attention decoder, in few operators a token.

The classes are SpeechBrain's, subclassed: constructor, options, algorithm and outputs are
inherited, and scorers are called as they are. Replaced is the loop over tokens:

===========================  ===============================  ===================================
step                         SpeechBrain                      here
===========================  ===============================  ===================================
attention keys and values    a copy for each hypothesis       one an utterance
hypotheses                   all their tokens copied at each  predecessors, followed at the end
                             token
ended hypotheses             read one by one from the GPU     one array a token goes to the host
===========================  ===============================  ===================================

Other decoders than one layer of GRU with location-aware attention, replaced or hooked parts,
overridden methods and searches without the decoder's scores run SpeechBrain's own loop, which says
so once; ``choose_backend`` tells why.

What is an utterance's own: the limits of tokens are those of its own frames, padding is cut off, so
that its hypotheses are those of a search for it alone. SpeechBrain takes the limits of the longest,
padding included. On the batch depend what the encoder and the scorers make of padding (a CTC
scorer's `ctc_window_size` is around the attention of all hypotheses), rounding of products, and
the outputs' relative lengths and padding.
"""

import numpy as np
import torch

from ._shared_attention import SharedAttention
from ._stock import seq2seq as stock
from .decoder import obstacle_of
from .ops._backends import forced_backend, warn_once

__all__ = ["S2SRNNBeamSearcher"]


class S2SRNNBeamSearcher(stock.S2SRNNBeamSearcher):
    """Beam search, a replacement of :class:`speechbrain.decoders.seq2seq.S2SRNNBeamSearcher`.

    Arguments, defaults, outputs and the scorers' interface are SpeechBrain's.

    Example
    -------
    >>> from sb_fast_sligru import AttentionalRNNDecoder
    >>> sizes = {"hidden_size": 7, "attn_dim": 5, "num_layers": 1, "enc_dim": 20, "input_size": 6}
    >>> search = S2SRNNBeamSearcher(
    ...     embedding=torch.nn.Embedding(9, 6),
    ...     decoder=AttentionalRNNDecoder("gru", "location", channels=2, kernel_size=3, **sizes),
    ...     linear=torch.nn.Linear(7, 9),
    ...     bos_index=1,
    ...     eos_index=2,
    ...     min_decode_ratio=0.0,
    ...     max_decode_ratio=1.0,
    ...     beam_size=4,
    ... )
    >>> search.set_n_out = lambda: 9  # a speechbrain.nnet.linear.Linear tells it itself
    >>> len(search(torch.rand(3, 10, 20), torch.ones(3))[0])
    3
    """

    def forward(self, enc_states, wav_len):
        """Search the best hypotheses of a batch.

        Arguments
        ---------
        enc_states : torch.Tensor
            Encoder states, [B, T, enc_dim]; B and T may be 0.
        wav_len : torch.Tensor
            Lengths of the utterances as fractions of T, [B], from 0 to 1. One that rounds to no
            frame, or whose frames allow no token, has the empty hypothesis, of score 0.

        Returns
        -------
        hyps : list of list of int
            The best hypothesis of each utterance, without eos; [B, topk, N] int64 if `return_topk`,
            with eos and padded by 0. Where an utterance has fewer than topk (beams larger than
            the vocabulary), the others are empty and their scores -inf.
        lengths : torch.Tensor
            Tokens without eos as fractions of N, [B] or [B, topk].
        scores : torch.Tensor
            [B] or [B, topk].
        log_probs : torch.Tensor
            Of each token by the decoder, times its weight, [B, N] or [B, topk, N].

        Raises
        ------
        ValueError
            If a shape or length is not one of those above, or `topk` is larger than `beam_size`.
        """
        name, reason = self.choose_backend()
        if name == "reference":
            if reason != "forced":
                warn_once(reason, "SpeechBrain's search (same results)")
            return super().forward(enc_states, wav_len)
        frames = _frames(self, enc_states, wav_len)
        if not 1 <= self.topk <= self.beam_size:
            raise ValueError(
                f"topk must be from 1 to beam_size, {self.beam_size}, but is {self.topk}"
            )
        with torch.no_grad():
            results = self._search(enc_states[:, : max(frames, default=0)], frames)
        if self.return_topk:
            return results
        hyps, lengths, scores, log_probs = (result[:, 0] for result in results)
        tokens = (lengths * hyps.shape[1]).round().int().tolist()
        hyps = [hyp[:n] for hyp, n in zip(hyps.tolist(), tokens, strict=True)]
        return hyps, lengths, scores, log_probs

    def choose_backend(self):
        """What serves a search now, and why.

        Returns
        -------
        name : str
            "shared", or "reference": SpeechBrain's own search.
        reason : str
            One clause, for people.
        """
        return _choose(self, stock.S2SRNNBeamSearcher)

    def _search(self, states, frames):
        """The topk hypotheses, as SpeechBrain's `_get_topk_prediction` returns them."""
        self.device, self.batch_size = states.device, len(frames)
        self.n_bh = self.batch_size * self.beam_size
        self.n_out = self.set_n_out()
        limits = [_limits(self, count) for count in frames]
        least = [limit[0] for limit in limits]
        found = _Hypotheses([limit[1] for limit in limits], self.beam_size, self.n_out)
        scores, log_probs = [], []
        if not found.is_searching.any():
            return found.best(self, scores, log_probs)

        frames = [max(1, count) for count in frames]
        lengths = torch.tensor(frames, device=self.device, dtype=torch.int)
        step = _Step(self, states, frames, self.beam_size)
        scorer_memory = None
        if self.scorer is not None:
            scorer_memory = self.scorer.reset_scorer_mem(states, lengths)
        self.beam_offset = torch.arange(self.batch_size, device=self.device) * self.beam_size
        tokens = torch.full((self.n_bh,), self.bos_index, device=self.device)
        peaks = torch.zeros(self.n_bh, device=self.device)
        alive = self.init_hypotheses()
        while found.is_searching.any():
            count = len(scores)
            decoded, attn = step(tokens, self.softmax)
            weighted = self.attn_weight * decoded  # which the following change in place
            weighted, peaks = self._max_attn_shift_step(attn, peaks, weighted)
            self._forbid_eos(weighted, [count < each for each in least])
            weighted = self._eos_threshold_step(weighted)
            weighted, scorer_memory = self._scorer_step(tokens, scorer_memory, attn, weighted)
            new_scores, candidates, predecessors, tokens, alive = (
                self._compute_scores_and_next_inp_tokens(alive, weighted, count)
            )
            step.permute(predecessors)
            scorer_memory = self._scorer_permute_memory_step(
                scorer_memory, predecessors, candidates
            )
            peaks = self._max_attn_shift_permute_memory_step(peaks, predecessors)
            # Not in place: without length normalisation they are the scores.
            alive.sequence_scores = alive.sequence_scores.masked_fill(
                tokens == self.eos_index, -torch.inf
            )
            scores.append(new_scores)
            log_probs.append(decoded.view(self.batch_size, -1).gather(1, candidates).view(-1))
            found.add(candidates.cpu().numpy(), self.eos_index)
        return found.best(self, scores, log_probs)

    def _forbid_eos(self, log_probs, is_early):
        """In the rows of utterances that have too few tokens yet."""
        if all(is_early):
            log_probs[:, self.eos_index] = self.minus_inf
        elif any(is_early):
            is_early = torch.tensor(is_early, device=self.device)
            log_probs[:, self.eos_index].masked_fill_(
                is_early.repeat_interleave(self.beam_size), self.minus_inf
            )


class _Step:
    """SpeechBrain's `forward_step` of search and decoder, and its memory."""

    def __init__(self, search, states, frames, beam):
        self.search, self.decoder = search, search.dec
        self.decoder.attn.reset()  # which SpeechBrain's search would fill
        self.attention = SharedAttention(self.decoder.attn, states, frames, beam)
        sizes = (self.decoder.attn_dim, self.decoder.hidden_size)
        self.sizes = sizes
        # Context and hidden state side by side: the output layer and `permute` take both.
        self.state = self.attention.keys.new_zeros(len(states) * beam, sum(sizes))

    def __call__(self, tokens, normalise):
        """Log-probabilities of the next token, and the attention."""
        search, decoder = self.search, self.decoder
        context, hidden = self.state.split(self.sizes, 1)
        inputs = decoder.drop(torch.cat([search.emb(tokens), context], 1))
        hidden = decoder.rnn.rnn_cells[0](inputs, hidden)
        context, weights = self.attention(hidden)
        self.state = torch.cat([context, hidden], 1)
        return normalise(search.fc(decoder.proj(self.state)) / search.temperature), weights

    def permute(self, index):
        """Let hypothesis i be what index[i] was."""
        self.state = self.state.index_select(0, index)
        self.attention.permute(index)


class _Hypotheses:
    """What the host knows of a beam search: who came from whom, and who has ended.

    Arguments
    ---------
    limits : list of int
        Tokens, eos included, that each utterance may have.
    beam : int
    n_out : int
        Size of the vocabulary.
    """

    def __init__(self, limits, beam, n_out):
        batch = len(limits)
        self.limits, self.beam, self.n_out = np.array(limits, dtype=int), beam, n_out
        self.tokens, self.predecessors = [], []  # [B, beam] of each step
        self.is_searching = self.limits > 0
        self.is_alive = np.zeros((batch, beam), bool)  # others have ended, or never began
        self.is_alive[:, :1] = True
        # Of the hypotheses that are done: how many, their last step, their place in it.
        self.count = np.zeros(batch, int)
        self.step = np.full((batch, beam), -1)
        self.place = np.zeros((batch, beam), int)
        self.is_twice = np.zeros((batch, beam), bool)

    def add(self, candidates, eos_index):
        """A step's choice, [B, beam]: predecessor * n_out + token."""
        predecessors, tokens = np.divmod(candidates, self.n_out)
        self.tokens.append(tokens)
        self.predecessors.append(predecessors)
        exists = np.take_along_axis(self.is_alive, predecessors, 1)
        is_eos = tokens == eos_index
        self.is_alive = exists & ~is_eos
        self._end(exists & is_eos, is_eos & False)
        is_last = self.limits == len(self.tokens)
        # As SpeechBrain: those that have ended in the last step are among the others once more.
        self._end(exists & is_last[:, None], is_eos)
        self.is_searching &= ~is_last & (self.count < self.beam) & self.is_alive.any(1)

    def _end(self, which, is_twice):
        places = self.count[:, None] + which.cumsum(1) - 1
        which = which & self.is_searching[:, None] & (places < self.beam)
        rows, columns = which.nonzero()
        places = places[rows, columns]
        self.step[rows, places] = len(self.tokens) - 1
        self.place[rows, places] = columns
        self.is_twice[rows, places] = is_twice[rows, columns]
        self.count += which.sum(1)

    def best(self, search, scores, log_probs):
        """The topk.

        Arguments
        ---------
        search : S2SRNNBeamSearcher
        scores, log_probs : list of torch.Tensor
            [B * beam] of each step.
        """
        device, (batch, beam) = search.device, self.step.shape
        longest = self.step.max(initial=-1) + 1
        exists = self.step >= 0
        if not search.length_normalization:  # SpeechBrain has lost the scores of these
            exists = exists & ~self.is_twice
        is_empty = (self.limits == 0)[:, None] & (np.arange(beam) == 0)
        final = torch.where(torch.from_numpy(is_empty).to(device), 0.0, -torch.inf)
        if scores:
            where = (self.step * batch + np.arange(batch)[:, None]) * beam + self.place
            where, exists = (torch.from_numpy(x).to(device) for x in (where * exists, exists))
            final = torch.where(exists, torch.stack(scores).view(-1)[where], final)
        final, order = final.topk(search.topk, dim=-1)

        order = order.cpu().numpy()
        step, place = (np.take_along_axis(x, order, 1) for x in (self.step, self.place))
        hyps = np.zeros((*step.shape, longest), int)
        positions = np.full(hyps.shape, -1)  # in the log-probabilities of all steps
        rows = np.arange(batch)[:, None]
        for now in range(longest - 1, -1, -1):
            is_token = now <= step
            hyps[..., now] = self.tokens[now][rows, place] * is_token
            positions[..., now] = np.where(is_token, (now * batch + rows) * beam + place, -1)
            place = np.where(is_token, self.predecessors[now][rows, place], place)
        chosen = torch.zeros(hyps.shape, device=device)
        if scores:
            positions = torch.from_numpy(positions).to(device)
            values = search.attn_weight * torch.stack(log_probs).view(-1)
            chosen = torch.where(positions < 0, 0.0, values[positions.clamp_min(0)])
        lengths = torch.from_numpy(np.maximum(step, 0)).to(device).float() / max(1, longest)
        return torch.from_numpy(hyps).to(device), lengths, final, chosen


def _choose(search, kind):
    """What serves a search, and why; `kind` is SpeechBrain's class of it."""
    if forced_backend() == "reference":
        return "reference", "forced"
    ours = next(cls for cls in type(search).__mro__ if cls.__module__ == __name__)
    for name in dir(kind):
        if name in _METHODS[kind]:
            found = getattr(type(search), name)
            if name in search.__dict__ or found is not getattr(ours, name):
                return "reference", f"{name} of the search is not SpeechBrain's"
    obstacle = obstacle_of(search.dec)
    if not obstacle and getattr(search, "attn_weight", 1.0) <= 0:
        obstacle = "the search is without the decoder's scores"
    return ("reference", obstacle) if obstacle else ("shared", "the fastest")


_METHODS = {
    kind: {
        name
        for cls in kind.__mro__
        if cls.__module__ == kind.__module__
        for name in vars(cls)
        if callable(getattr(cls, name)) and name not in ("__init__", "forward", "set_n_out")
    }
    for kind in (stock.S2SRNNBeamSearcher, stock.S2SRNNGreedySearcher)
}


def _limits(search, frames):
    """The least and the greatest number of tokens that an utterance may have, eos included."""
    return search.change_max_decoding_length(
        int(frames * search.min_decode_ratio), int(frames * search.max_decode_ratio)
    )


def _frames(search, enc_states, wav_len):
    """The number of frames of each utterance, a list; ValueError for a bad shape or length."""
    features = search.dec.attn.mlp_enc.in_features
    if enc_states.ndim != 3 or enc_states.shape[2] != features:
        raise ValueError(
            f"enc_states must be [batch, frames, {features}], "
            f"but its shape is {list(enc_states.shape)}"
        )
    batch, longest, _ = enc_states.shape
    if list(wav_len.shape) != [batch]:
        raise ValueError(f"wav_len must be [{batch}], but its shape is {list(wav_len.shape)}")
    frames = torch.round(longest * wav_len).tolist()
    if not all(0 <= count <= longest for count in frames):  # not NaN
        raise ValueError(f"wav_len must be from 0 to 1, but is {wav_len.tolist()}")
    return [int(count) for count in frames]
