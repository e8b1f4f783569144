// What the parts that know torch share.
#pragma once

#include <string>

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <c10/util/Exception.h>

#include "errors.h"
#include "streams.h"

namespace rpctest {

inline void check(int error) {
  TORCH_CHECK(error == kSuccess, "rpctest: ", errorText(error));
}

inline c10::Device asDevice(int device) {
  return c10::Device(c10::DeviceType::PrivateUse1, static_cast<c10::DeviceIndex>(device));
}

// Of the calling thread.
c10::Stream currentStream(c10::Device device);

// As the runtime has it: the default stream is nullptr there, and stands for that of the current device.
Stream* handleOf(const c10::Stream& stream);
// The stream itself.
Stream* queueOf(const c10::Stream& stream);
inline Stream* currentQueue(c10::Device device) {
  return queueOf(currentStream(device));
}

} // namespace rpctest
