// What the descriptions of tensors are made of, which TensorWriter writes and readTensors() reads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_rpc_mpi {

enum class Form : uint8_t { kPlain = 1, kUndefined = 2, kPickled = 3 };

enum Flags : uint8_t { kRequiresGrad = 1, kConjugated = 2, kNegated = 4, kContiguous = 8 };

constexpr size_t kMaxDimensions = 64;

} // namespace torch_rpc_mpi
