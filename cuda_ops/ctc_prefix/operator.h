// The boundary of the operator: the arguments of its two ops, checked and gathered in one struct.
// Each device registers its implementation through Operator. `sb_fast_sligru.ops.ctc_prefix_scores`
// and `ctc_prefix_extend` prepare the arguments; ctc_prefix.h has the mathematics and the axes.
#pragma once

#include "common/tensors.h"
#include "ctc_prefix/ctc_prefix.h"

namespace sb_fast_sligru::ctc_prefix {

struct Inputs {
  Tensor log_probs, lengths, state, last_tokens;
  OptionalTensor window;
  int64_t blank;

  int64_t vocabulary() const { return log_probs.size(1); }
  int64_t frames() const { return log_probs.size(2); }
  int64_t hypotheses() const { return state.size(0); }

  Prefixes prefixes() const {
    Prefixes d = {};
    d.batch = log_probs.size(0);
    d.frames = frames();
    d.vocabulary = vocabulary();
    d.hypotheses = hypotheses();
    d.blank = blank;
    d.type = dtype_of(log_probs.scalar_type());
    d.log_probs = log_probs.const_data_ptr();
    d.lengths = integers(lengths);
    d.state = state.const_data_ptr();
    d.last_tokens = integers(last_tokens);
    d.window = window ? integers(*window) : nullptr;
    return d;
  }

  static const int64_t* integers(const Tensor& t) {
    return static_cast<const int64_t*>(t.const_data_ptr());
  }
};

// ---- checks
// Raises unless t has these sizes, this dtype and the device of log_probs; returns it contiguous.
inline Tensor checked(const char* name, const Tensor& t, const std::vector<int64_t>& sizes,
                      const Tensor& log_probs, ScalarType type = ScalarType::Long) {
  return checked_tensor(name, t, sizes, {type}, log_probs, "log_probs");
}

inline void check_token(const char* name, int64_t token, int64_t vocabulary) {
  STD_TORCH_CHECK(token >= 0 && token < vocabulary, name, ": got ", token, ", expected 0 to ",
                  vocabulary - 1);
}

// Raises for a bad argument; makes all contiguous.
inline Inputs check_inputs(const Tensor& log_probs, const Tensor& lengths, const Tensor& state,
                           const Tensor& last_tokens, OptionalTensor window, int64_t blank) {
  STD_TORCH_CHECK(log_probs.dim() == 3 && log_probs.size(1) > 0, "log_probs: got ",
                  describe(log_probs), ", expected [B, V, T]");
  const ScalarType type = log_probs.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, "log_probs: got ",
                  describe(log_probs), ", expected float64 or float32");
  const int64_t B = log_probs.size(0), states = log_probs.size(2) + 1;
  STD_TORCH_CHECK(state.dim() == 3 && (B == 0 ? state.size(0) == 0 : state.size(0) % B == 0),
                  "state: got ", describe(state), ", expected [N, 2, ", states,
                  "], N a multiple of ", B);
  const int64_t N = state.size(0);
  check_token("blank_index", blank, log_probs.size(1));
  Inputs in{torch::stable::contiguous(log_probs),
            checked("lengths", lengths, {B}, log_probs),
            checked("state", state, {N, 2, states}, log_probs, type),
            checked("last_tokens", last_tokens, {N}, log_probs),
            std::nullopt,
            blank};
  if (window) in.window = checked("window", *window, {2}, log_probs);
  return in;
}

// Raises unless all are from 0 to size - 1. They must be in the CPU's memory.
inline void check_range(const char* name, const Tensor& t, int64_t size) {
  const int64_t* values = Inputs::integers(t);
  for (int64_t i = 0; i < t.numel(); ++i)
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < size, name, ": got ", values[i],
                    ", expected 0 to ", size - 1);
}

// ---- the ops
// As the dispatcher calls them. A device's Implementation has scores(log_probs, arguments) and
// extend(log_probs, arguments), and check(name, indices, size) where the host can read them.
template <class Implementation>
struct Operator {
  static Tensor scores(const Tensor& log_probs, const Tensor& lengths, const Tensor& state,
                       const Tensor& last_tokens, OptionalTensor candidates, OptionalTensor window,
                       int64_t blank_index, int64_t eos_index) {
    const Inputs in =
        check_inputs(log_probs, lengths, state, last_tokens, std::move(window), blank_index);
    const int64_t N = in.hypotheses(), V = in.vocabulary();
    check_token("eos_index", eos_index, V);
    Scores p = {in.prefixes()};
    p.eos = eos_index;
    p.candidate_count = V;
    Tensor psi = new_empty(in.log_probs, {N, V}, in.log_probs.scalar_type());
    if (candidates) {
      STD_TORCH_CHECK(candidates->dim() == 2, "candidates: got ", describe(*candidates),
                      ", expected [N, C]");
      candidates = checked("candidates", *candidates, {N, candidates->size(1)}, in.log_probs);
      Implementation::check("candidates", *candidates, V);
      p.candidate_count = candidates->size(1);
      p.candidates = Inputs::integers(*candidates);
      torch::stable::fill_(psi, kLogZero);
    }
    p.psi = psi.mutable_data_ptr();
    if (N > 0) Implementation::scores(in.log_probs, p);
    return psi;
  }

  static Tensor extend(const Tensor& log_probs, const Tensor& lengths, const Tensor& state,
                       const Tensor& last_tokens, const Tensor& parents, const Tensor& tokens,
                       OptionalTensor window, int64_t blank_index) {
    const Inputs in =
        check_inputs(log_probs, lengths, state, last_tokens, std::move(window), blank_index);
    STD_TORCH_CHECK(parents.dim() == 1, "parents: got ", describe(parents), ", expected [M]");
    const int64_t M = parents.size(0);
    const Tensor all_parents = checked("parents", parents, {M}, in.log_probs),
                 all_tokens = checked("tokens", tokens, {M}, in.log_probs);
    Implementation::check("parents", all_parents, in.hypotheses());
    Implementation::check("tokens", all_tokens, in.vocabulary());
    Extension p = {in.prefixes()};
    p.count = M;
    p.parents = Inputs::integers(all_parents);
    p.tokens = Inputs::integers(all_tokens);
    const Tensor next =
        new_empty(in.log_probs, {M, 2, in.frames() + 1}, in.log_probs.scalar_type());
    p.state = next.mutable_data_ptr();
    if (M > 0) Implementation::extend(in.log_probs, p);
    return next;
  }
};

}  // namespace sb_fast_sligru::ctc_prefix
