// The launchers of the kernel families, each in the file of its name. Called by run_forward() and
// run_backward() with a choice of their family.
#pragma once

#include "light_gru/persistent/persistent.h"

namespace sb_fast_sligru {

cudaError_t run_forward_narrow(const PersistentForward& p, cudaStream_t stream);
cudaError_t run_forward_narrow_float(const PersistentForward& p, cudaStream_t stream);
cudaError_t run_forward_wide(const PersistentForward& p, cudaStream_t stream);
cudaError_t run_forward_wide_float(const PersistentForward& p, cudaStream_t stream);
cudaError_t run_forward_many(const PersistentForward& p, cudaStream_t stream);
cudaError_t run_forward_l2(const PersistentForward& p, cudaStream_t stream);

cudaError_t run_backward_narrow(const PersistentBackward& p, cudaStream_t stream);
cudaError_t run_backward_narrow_float(const PersistentBackward& p, cudaStream_t stream);
cudaError_t run_backward_wide(const PersistentBackward& p, cudaStream_t stream);
cudaError_t run_backward_wide_float(const PersistentBackward& p, cudaStream_t stream);
cudaError_t run_backward_many(const PersistentBackward& p, cudaStream_t stream);
cudaError_t run_backward_l2(const PersistentBackward& p, cudaStream_t stream);

}  // namespace sb_fast_sligru
