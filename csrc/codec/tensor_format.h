// What the descriptions of tensors are made of, which TensorWriter writes and readTensors() reads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_rpc_mpi {

// Behind the form of a tensor:
//   plain: a description, that is dtype, flags, number of dimensions, slice, offset, sizes, and strides unless
//   contiguous; sparse: flags, number of dimensions, sizes, and descriptions of the indices and values; or for CSR of
//   the
//     compressed row indices, the column indices and the values;
//   quantized: its scheme; scale and zero point, or else the axis of the channels; its description, and descriptions of
//     the scales and zero points of the channels.
enum class Form : uint8_t { kPlain = 1, kUndefined = 2, kSparse = 3, kSparseCsr = 4, kQuantized = 5 };

enum Flags : uint8_t { kRequiresGrad = 1, kConjugated = 2, kNegated = 4, kContiguous = 8 };

constexpr size_t kMaxDimensions = 64;

} // namespace torch_rpc_mpi
