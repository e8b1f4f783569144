// Whether the indices of a received sparse tensor name only what it has: operators rely on that.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_rpc_mpi {

// Both throw BadMessage where the parts do not fit each other, which no sender sends, and std::invalid_argument for
// indices beyond the sizes.
void checkSparse(const at::Tensor& indices, const at::Tensor& values, c10::IntArrayRef sizes);
void checkSparseCsr(
    const at::Tensor& rows,
    const at::Tensor& columns,
    const at::Tensor& values,
    c10::IntArrayRef sizes);

} // namespace torch_rpc_mpi
