// What the functions of the runtime have in common. As in the CUDA runtime nearly every call makes a context on the
// thread's current device, an error is kept for GetLastError(), and what might wait is forbidden during a capture.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "errors.h"

namespace rpctest {

int result(int error);
int takeLastError();

// What comes first in a call that needs a context.
int enter();
int enterWhereNothingCaptures();

// As those calls do that wait for the device.
void synchronizeAll();

// What callers of the runtime have made and not given back. What torch's tensors have of memory is not among it.
enum class Counted { kAllocations, kPinned, kRegistered, kOpened };
int64_t live(Counted what);
int counted(Counted what, int change, int error); // counts if there was no error, and returns it

} // namespace rpctest
