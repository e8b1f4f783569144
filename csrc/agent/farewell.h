// What a goodbye says.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include "base/error_text.h"
#include "peer/frame.h"

namespace torch_rpc_mpi {

struct Farewell {
  std::string text;  // why the worker leaves
  std::string cause; // the loss because of which it does, if that is why: for those that hear of this first
};

// Of each part so many bytes, because a goodbye is to fit its frame.
inline constexpr size_t kFarewellBytes = 400;

// The body of the frame, and what is in one, which may be anything.
inline std::string writeFarewell(const Farewell& farewell) {
  std::string body = farewell.text.substr(0, kFarewellBytes);
  body += '\0';
  body += farewell.cause.substr(0, kFarewellBytes);
  return body;
}

inline Farewell readFarewell(ConstSpan body) {
  const std::string_view bytes(body.data, body.bytes);
  const size_t end = std::min(bytes.find('\0'), bytes.size());
  return {readableText(bytes.substr(0, end)), readableText(bytes.substr(std::min(end + 1, bytes.size())))};
}

} // namespace torch_rpc_mpi
