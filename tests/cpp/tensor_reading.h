// Reads of a tensor all that a program may read, for the sanitizers to see.
#pragma once

#include <ATen/Functions.h>

#include "check.h"

namespace torch_rpc_mpi::testing {

// All bytes from a tensor's first to its last. Here, because AddressSanitizer does not see what torch's own code reads.
inline void touch(const at::Tensor& tensor) {
  size_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += static_cast<size_t>(tensor.size(d) - 1) * static_cast<size_t>(tensor.stride(d));
  }
  const auto* bytes = static_cast<const volatile char*>(tensor.const_data_ptr());
  for (size_t i = 0; tensor.numel() > 0 && i < (last + 1) * tensor.itemsize(); ++i) {
    (void)bytes[i];
  }
}

// All that a program may read of a tensor.
inline void readAll(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return;
  }
  if (tensor.layout() == at::kSparse) {
    touch(tensor._indices());
    touch(tensor._values());
  } else if (tensor.layout() == at::kSparseCsr) {
    touch(tensor.crow_indices());
    touch(tensor.col_indices());
    touch(tensor.values());
  } else {
    touch(tensor);
  }
  if (tensor.is_quantized() && tensor.qscheme() != at::kPerTensorAffine) {
    const int64_t channels = tensor.size(tensor.q_per_channel_axis());
    for (const at::Tensor& each : {tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()}) {
      touch(each);
      CHECK_EQUAL(each.numel(), channels);
    }
  }
  // Shapes without end over little memory are valid (strides of 0), but take for ever.
  if (tensor.numel() > (1 << 12)) {
    return;
  }
  if (tensor.is_quantized()) {
    (void)tensor.dequantize();
  } else if (tensor.layout() != at::kStrided) {
    (void)tensor.to_dense();
  } else {
    (void)tensor.clone(at::MemoryFormat::Contiguous);
  }
}

} // namespace torch_rpc_mpi::testing
