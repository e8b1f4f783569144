// Tensors of the CPU over a device's memory, with which tasks of streams run the CPU's kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "streams.h"

namespace rpctest {

// Owns nothing, as a kernel's argument: the allocator sees to it that the memory is still there. So no tensor that
// Python knows is let go by a stream's thread, which would wait for the interpreter.
at::Tensor aliasOf(const at::Tensor& tensor);

// The task runs with torch's autograd off.
void pushKernel(Stream* stream, Task task);

} // namespace rpctest
