// The frame by which the finder of a loss tells the others of it: see Note [Liveness across hosts].
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "base/error_text.h"
#include "peer/frame.h"

namespace torch_rpc_mpi {

struct LossNews {
  int rank;         // that is lost
  std::string text; // what has happened, a clause about that rank
};

inline constexpr size_t kLossTextBytes = 400;

inline std::string writeLossNews(const LossNews& news) {
  std::string body(sizeof(int32_t), '\0');
  const auto rank = static_cast<int32_t>(news.rank);
  std::memcpy(body.data(), &rank, sizeof(rank));
  return body + news.text.substr(0, kLossTextBytes);
}

// Throws std::runtime_error where it makes no sense in a group of that size.
inline LossNews readLossNews(ConstSpan body, int size) {
  int32_t rank = -1;
  if (body.bytes >= sizeof(rank)) {
    std::memcpy(&rank, body.data, sizeof(rank));
  }
  if (rank < 0 || rank >= size) {
    throw std::runtime_error("a rank that there is not is lost");
  }
  return {rank, readableText({body.data + sizeof(rank), body.bytes - sizeof(rank)})};
}

} // namespace torch_rpc_mpi
