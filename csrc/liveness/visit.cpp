#include "liveness/visit.h"

#include <array>

#include <sys/socket.h>

namespace torch_rpc_mpi {

bool Visit::greet(int& error) {
  pollfd state{socket_.descriptor(), POLLOUT, 0};
  if (greeted_ || ::poll(&state, 1, 0) == 0) {
    error = EAGAIN;
    return greeted_;
  }
  error = connectError(socket_);
  if (error == 0) {
    greeted_ = sendNow(socket_, greeting_);
    error = greeted_ ? EAGAIN : errno;
  }
  return greeted_;
}

std::optional<Signal> Visit::receiveLast(int& error) const {
  std::array<char, 64> bytes{};
  std::optional<Signal> last;
  for (;;) {
    const ssize_t count = ::recv(socket_.descriptor(), bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count <= 0) {
      error = count == 0 ? ECONNRESET : errno;
      return last;
    }
    last = static_cast<Signal>(bytes[static_cast<size_t>(count) - 1]);
  }
}

} // namespace torch_rpc_mpi
