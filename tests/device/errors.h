// The errors of the CUDA runtime that the test device's functions return.
#pragma once

namespace rpctest {

constexpr int kSuccess = 0;
constexpr int kInvalidValue = 1;
constexpr int kMemoryAllocation = 2;
constexpr int kInitializationError = 3;
constexpr int kInvalidDevice = 101;
constexpr int kInvalidContext = 201;
constexpr int kMapBufferFailed = 205;
constexpr int kPeerAccessUnsupported = 217;
constexpr int kInvalidResourceHandle = 400;
constexpr int kNotReady = 600;
constexpr int kHostMemoryAlreadyRegistered = 712;
constexpr int kHostMemoryNotRegistered = 713;
constexpr int kNotSupported = 801;
constexpr int kStreamCaptureUnsupported = 900;
constexpr int kStreamCaptureInvalidated = 901;

const char* errorText(int error);

} // namespace rpctest
