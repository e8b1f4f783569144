// An imitation of CUDA's graph capture: what is queued on a stream that captures runs when the graph is launched. While
// a capture is under way, calls that might wait are errors for threads whose mode does not permit them, and spoil it.
#pragma once

#include <memory>

#include "streams.h"

namespace rpctest {

enum CaptureMode : int { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };

// Each returns an error of the runtime.
int checkNoCapture();               // of a call that a capture does not permit
int exchangeCaptureMode(int* mode); // of this thread
int beginCapture(Stream* stream, int mode);
int endCapture(Stream* stream, std::shared_ptr<Tasks>* graph);

} // namespace rpctest
