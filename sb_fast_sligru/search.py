"""SpeechBrain's searches with an attention decoder, in few operators a token.

The classes are SpeechBrain's, subclassed: constructor, options, algorithm and outputs are
inherited, and scorers are called as they are. Replaced is the loop over tokens:

===========================  ===============================  ===================================
step                         SpeechBrain                      here
===========================  ===============================  ===================================
attention keys and values    a copy for each hypothesis       one an utterance
energies of the attention    operators over hypotheses,       ``ops.location_energies``
                             frames and units
hypotheses                   all their tokens copied at each  predecessors, followed at the end
                             token
ended hypotheses             read one by one from the GPU     one array a token goes to the host,
                                                              while the next token is computed
linear layers on a CPU       MKL's                            ``ops.few_rows_linear``
decoder on a GPU             an operator at a time            a CUDA graph, captured anew for each
                                                              search
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

import inspect

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

from ._parts import build_module, is_plain
from ._replay import Replay
from ._shared_attention import SharedAttention
from ._stock import embedding, linear
from ._stock import seq2seq as stock
from .decoder import obstacle_of
from .ops import few_rows_linear
from .ops._backends import forced_backend, warn_once

__all__ = ["S2SRNNBeamSearcher", "S2SRNNGreedySearcher", "build"]


class S2SRNNBeamSearcher(stock.S2SRNNBeamSearcher):
    """Beam search, a replacement of :class:`speechbrain.decoders.seq2seq.S2SRNNBeamSearcher`.

    Arguments, defaults, outputs and the scorers' interface are SpeechBrain's.

    Example
    -------
    >>> from speechbrain.nnet.linear import Linear
    >>> from sb_fast_sligru import AttentionalRNNDecoder
    >>> sizes = {"hidden_size": 7, "attn_dim": 5, "num_layers": 1, "enc_dim": 20, "input_size": 6}
    >>> search = S2SRNNBeamSearcher(
    ...     embedding=torch.nn.Embedding(9, 6),
    ...     decoder=AttentionalRNNDecoder("gru", "location", channels=2, kernel_size=3, **sizes),
    ...     linear=Linear(input_size=7, n_neurons=9),
    ...     bos_index=1,
    ...     eos_index=2,
    ...     min_decode_ratio=0.0,
    ...     max_decode_ratio=1.0,
    ...     beam_size=4,
    ... )
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
        return _choose(self)

    def _obstacle(self):
        """Tell what our loop cannot stand in for, "" if there is nothing."""
        return _obstacle_of(self, stock.S2SRNNBeamSearcher)

    def _search(self, states, frames):
        """The topk hypotheses, as SpeechBrain's `_get_topk_prediction` returns them."""
        self.device, self.batch_size = states.device, len(frames)
        self.n_bh = self.batch_size * self.beam_size
        self.n_out = self.set_n_out()
        limits = [_limits(self, count) for count in frames]
        found = _Hypotheses([limit[1] for limit in limits], self.beam_size, self.n_out)
        scores, of_tokens = [], []
        if not found.is_searching.any():
            return found.best(self, scores, of_tokens)

        frames = [max(1, count) for count in frames]
        lengths = torch.tensor(frames, device=self.device, dtype=torch.int)
        step = _BeamStep(self, states, frames)
        scorer_memory = None
        if self.scorer is not None:
            scorer_memory = self.scorer.reset_scorer_mem(states, lengths)
        latest = max(limit[0] for limit in limits)
        least = torch.tensor([limit[0] for limit in limits], device=self.device)
        least = least.repeat_interleave(self.beam_size)
        first = torch.arange(self.batch_size, device=self.device)[:, None] * self.beam_size
        tokens = torch.full((self.n_bh,), self.bos_index, device=self.device)
        predecessors = torch.arange(self.n_bh, device=self.device)
        totals = torch.full((self.batch_size, self.beam_size, 1), -torch.inf, device=self.device)
        totals[:, 0] = 0.0  # the others do not exist yet
        on_their_way = []  # candidates to the host, of the last step
        while found.is_searching.any():
            decoded, log_probs, attn = step.scores(tokens, predecessors)
            if len(scores) < latest:
                eos = log_probs[:, self.eos_index]
                eos.masked_fill_(least > len(scores), self.minus_inf)
            if self.scorer is not None:
                attn = attn.clone()  # which a scorer may keep
            log_probs, scorer_memory = self._scorer_step(tokens, scorer_memory, attn, log_probs)
            totals = totals + log_probs.reshape(self.batch_size, self.beam_size, self.n_out)
            # Of one length are all, so that length normalisation would choose the same.
            totals, candidates = totals.flatten(1).topk(self.beam_size, -1)
            predecessors = candidates.div(self.n_out, rounding_mode="floor").add_(first).view(-1)
            tokens = (candidates % self.n_out).view(-1)
            scorer_memory = self._scorer_permute_memory_step(
                scorer_memory, predecessors, candidates
            )
            scores.append(totals)
            of_tokens.append(decoded.view(self.batch_size, -1).gather(1, candidates))
            is_eos = (tokens == self.eos_index).view_as(totals)
            totals = totals.masked_fill(is_eos, -torch.inf).unsqueeze(2)
            # While a GPU works on this step the host looks at the one before. So it finds out one
            # step late that the search is over: nobody looks at that step.
            on_their_way.append(_to_host(candidates))
            if candidates.is_cpu or len(on_their_way) > 1:
                found.add(on_their_way.pop(0)(), self.eos_index)
        return found.best(self, scores, of_tokens)


class S2SRNNGreedySearcher(stock.S2SRNNGreedySearcher):
    """Greedy search, a replacement of :class:`speechbrain.decoders.seq2seq.S2SRNNGreedySearcher`.

    Arguments, defaults and outputs are SpeechBrain's.

    Example
    -------
    >>> from speechbrain.nnet.linear import Linear
    >>> from sb_fast_sligru import AttentionalRNNDecoder
    >>> sizes = {"hidden_size": 7, "attn_dim": 5, "num_layers": 1, "enc_dim": 20, "input_size": 6}
    >>> search = S2SRNNGreedySearcher(
    ...     embedding=torch.nn.Embedding(9, 6),
    ...     decoder=AttentionalRNNDecoder("gru", "location", channels=2, kernel_size=3, **sizes),
    ...     linear=Linear(input_size=7, n_neurons=9),
    ...     bos_index=1,
    ...     eos_index=2,
    ...     min_decode_ratio=0.0,
    ...     max_decode_ratio=1.0,
    ... )
    >>> len(search(torch.rand(3, 10, 20), torch.ones(3))[0])
    3
    """

    @torch.no_grad()
    def forward(self, enc_states, wav_len, attention_mask=None):
        """Search the hypotheses of a batch.

        Arguments
        ---------
        enc_states : torch.Tensor
            Encoder states, [B, T, enc_dim]; B and T may be 0.
        wav_len : torch.Tensor
            Lengths of the utterances as fractions of T, [B], from 0 to 1. One that rounds to no
            frame, or whose frames allow no token, has the empty hypothesis.
        attention_mask : torch.Tensor, optional
            For searches with other decoders, ignored as in SpeechBrain's.

        Returns
        -------
        hyps : list of list of int
            Without eos.
        lengths : torch.Tensor
            Tokens without eos as fractions of N, [B, 1].
        scores : torch.Tensor
            Of each token, [B, 1, N]; 0 from eos on.
        log_probs : torch.Tensor
            [B, 1, N, vocabulary] float32, -inf from eos on.

        Raises
        ------
        ValueError
            If a shape or length is not one of those above.
        """
        name, reason = self.choose_backend()
        if name == "reference":
            if reason != "forced":
                warn_once(reason, "SpeechBrain's search (same results)")
            return super().forward(enc_states, wav_len, attention_mask)
        frames = _frames(self, enc_states, wav_len)
        limits = [_limits(self, count) for count in frames]
        limits = [most - least for least, most in limits]  # SpeechBrain counts from the least
        log_probs = self._search(enc_states[:, : max(frames, default=0)], frames, limits)
        scores, predictions = log_probs.max(-1)
        is_over = scores == -torch.inf
        scores.masked_fill_(is_over, 0.0)
        predictions.masked_fill_(is_over, self.eos_index)
        tokens = (predictions == self.eos_index).cumsum(1).eq(0).sum(1).tolist()
        hyps = [hyp[:n] for hyp, n in zip(predictions.tolist(), tokens, strict=True)]
        lengths = torch.tensor(tokens, dtype=torch.float, device=scores.device)
        lengths = lengths / max(1, scores.shape[1])
        return hyps, lengths.unsqueeze(1), scores.unsqueeze(1), log_probs.unsqueeze(1)

    def choose_backend(self):
        """What serves a search now, and why; as that of :class:`S2SRNNBeamSearcher`."""
        return _choose(self)

    def _obstacle(self):
        """Tell what our loop cannot stand in for, "" if there is nothing."""
        return _obstacle_of(self, stock.S2SRNNGreedySearcher)

    def _search(self, states, frames, limits):
        """Log-probabilities, [B, N, vocabulary], -inf where a hypothesis has ended."""
        batch, longest = len(frames), max(limits, default=0)
        if longest <= 0:
            return torch.zeros(batch, 0, self.set_n_out(), device=states.device)
        step = _Step(self, states, [max(1, count) for count in frames], 1)
        tokens = torch.full((batch,), self.bos_index, device=states.device)
        has_ended = torch.zeros(batch, dtype=torch.bool, device=states.device)
        ends = torch.tensor(limits, device=states.device)
        found = []
        for count in range(longest):
            logits, _ = step.logits(tokens)
            if self.temperature == 0:
                tokens = logits.argmax(-1)
            else:
                scaled = Categorical(logits=logits / self.temperature, validate_args=False)
                tokens = scaled.sample()
            has_ended = has_ended | (tokens == self.eos_index)
            if count >= min(limits):
                has_ended |= ends <= count
            tokens = tokens.masked_fill(has_ended, self.eos_index)
            log_probs = torch.log_softmax(logits.float(), -1)
            found.append(log_probs.masked_fill_(has_ended.unsqueeze(1), -torch.inf))
            if has_ended.all():
                break
        return torch.stack(found, 1)


def build(search_class, **arguments):
    """Build a search of a class that a YAML has under a key of its own.

    Arguments
    ---------
    search_class : type
        :class:`S2SRNNBeamSearcher`, :class:`S2SRNNGreedySearcher`, or SpeechBrain's.
    **arguments
        Of its constructor.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If `search_class` is not a class of modules.
    """
    return build_module("search_class", search_class, arguments)


def _to_host(tensor):
    """Start to copy a tensor; what is returned waits for it and gives the array."""
    if tensor.is_cpu:
        return tensor.numpy
    copied = tensor.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))

    def wait():
        event.synchronize()
        return copied.numpy()

    return wait


class _Step:
    """SpeechBrain's `forward_step` of search and decoder, and its memory.

    All tensors keep their place, as a CUDA graph wants it.
    """

    def __init__(self, search, states, frames, beam):
        self.search, self.decoder = search, search.dec
        self.decoder.attn.reset()  # which SpeechBrain's search would fill
        self.attention = SharedAttention(self.decoder.attn, states, frames, beam)
        # Context and hidden state side by side: the output layer and `permute` take both.
        self.sizes = (self.decoder.attn_dim, self.decoder.hidden_size)
        self.state = self.attention.keys.new_zeros(len(states) * beam, sum(self.sizes))
        self.output_layer = _output_layer(search.fc)
        self.logits = _replayed(search, self._logits)

    def _logits(self, tokens, predecessors=None):
        """What the output layer says of the next token, [B * beam, n_out], and the attention.

        Hypothesis i is what predecessors[i] was, with one token more.
        """
        decoder, state = self.decoder, self.state
        if predecessors is not None:
            state = state.index_select(0, predecessors)
        context, hidden = state.split(self.sizes, 1)
        inputs = decoder.drop(torch.cat([self.search.emb(tokens), context], 1))
        hidden = _gru(decoder.rnn.rnn_cells[0], inputs, hidden)
        context, weights = self.attention(hidden, predecessors)
        torch.cat([context, hidden], 1, out=self.state)
        projected = few_rows_linear(self.state, decoder.proj.weight, decoder.proj.bias)
        return self.output_layer(projected), weights


class _BeamStep(_Step):
    """A step of the decoder with what a beam search makes of it before the scorers."""

    def __init__(self, search, states, frames):
        super().__init__(search, states, frames, search.beam_size)
        self.peaks = torch.zeros(len(self.state), dtype=torch.long, device=states.device)
        self.highest = torch.zeros_like(self.peaks, dtype=self.attention.weights.dtype)
        self.scores = _replayed(search, self._scores)

    def _scores(self, tokens, predecessors):
        """Log-probabilities of the next token, [B * beam, n_out].

        As they are, weighted and without what the attention and the threshold of eos forbid; and
        the attention.
        """
        search = self.search
        logits, attn = self._logits(tokens, predecessors)
        decoded = search.softmax(logits / search.temperature)
        log_probs = search.attn_weight * decoded
        if search.using_max_attn_shift:
            before = self.peaks.index_select(0, predecessors)
            torch.max(attn, 1, out=(self.highest, self.peaks))
            shift = self.peaks - before
            is_far = (shift > search.max_attn_shift) | (shift <= -search.max_attn_shift)
            log_probs.masked_fill_(is_far.unsqueeze(1), search.minus_inf)
        if search.using_eos_threshold:
            eos = log_probs[:, search.eos_index]
            least = search.eos_threshold * log_probs.amax(-1)
            eos.masked_fill_(eos <= least, search.minus_inf)
        return decoded, log_probs, attn


def _gru(cell, inputs, hidden):
    """What `cell`, a torch.nn.GRUCell, returns; on a GPU it is one kernel beside the products."""
    if hidden.is_cuda:
        return cell(inputs, hidden)
    size = cell.hidden_size
    x = few_rows_linear(inputs, cell.weight_ih, cell.bias_ih)
    h = few_rows_linear(hidden, cell.weight_hh, cell.bias_hh)
    reset, update = (x[:, : 2 * size] + h[:, : 2 * size]).sigmoid_().chunk(2, 1)
    new = torch.addcmul(x[:, 2 * size :], reset, h[:, 2 * size :]).tanh_()
    return torch.addcmul(new, update, hidden - new)


def _output_layer(module):
    """What computes the same as a search's output layer does, which may be anybody's."""
    if not is_plain(module, linear.Linear) or not is_plain(module.w, nn.Linear):
        return module
    if module.max_norm is not None or module.combine_dims:
        return module
    return lambda x: few_rows_linear(x, module.w.weight, module.w.bias)


def _replayed(search, function):
    """A step of the decoder, in a CUDA graph if nothing in it is anybody else's."""
    kinds = (nn.Embedding, nn.Linear, embedding.Embedding, linear.Linear)
    parts = [part for whole in (search.emb, search.fc) for part in whole.modules()]
    is_known = all(
        any(is_plain(part, kind) for kind in kinds) and getattr(part, "max_norm", None) is None
        for part in parts
    )
    return Replay(function) if is_known else function


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
        self.limits, self.beam, self.n_out = np.array(limits, dtype=int).clip(0), beam, n_out
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
            [B, beam] of each step.
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
            found = torch.stack(scores).view(-1)[where]
            if search.length_normalization:
                found = found / torch.from_numpy(self.step + 1).to(device)
            final = torch.where(exists, found, final)
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
        lengths = torch.from_numpy(np.maximum(step, 0)).to(device, torch.float32) / max(1, longest)
        return torch.from_numpy(hyps).to(device), lengths, final, chosen


def _choose(search):
    """What serves a search, and why."""
    if forced_backend() == "reference":
        return "reference", "forced"
    obstacle = search._obstacle()
    return ("reference", obstacle) if obstacle else ("shared", "the fastest")


def _obstacle_of(search, kind):
    """Tell what our loops cannot stand in for; `kind` is SpeechBrain's class of the search."""
    for name in _METHODS[kind]:
        if getattr(type(search), name) is not getattr(kind, name) or name in search.__dict__:
            return f"{name} of the search is not SpeechBrain's"
    obstacle = obstacle_of(search.dec)
    if not obstacle and getattr(search, "attn_weight", 1.0) <= 0:
        obstacle = "the search is without the decoder's scores"
    return obstacle


# SpeechBrain's class -> its methods, which our loops call or stand in for.
_METHODS = {
    kind: sorted(
        name
        for cls in kind.__mro__
        if cls.__module__ == kind.__module__
        for name in vars(cls)
        if inspect.isfunction(getattr(cls, name)) and name not in ("__init__", "forward")
    )
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
