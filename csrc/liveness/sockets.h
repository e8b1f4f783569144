// TCP connections between the processes of a group: all that is open to others of what this package does itself.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

namespace torch_rpc_mpi {

// A descriptor that belongs to this process alone: a forked child, which would keep the connection open when its parent
// has died, closes it. Never blocks.
class Socket {
 public:
  Socket() = default;
  // What `open` gives: the descriptor of a new socket, or -1. No fork comes between.
  template <typename Open>
  static Socket from(Open&& open) {
    const std::lock_guard<std::mutex> lock(beginOpening());
    Socket socket;
    socket.descriptor_ = open();
    keep(socket.descriptor_);
    return socket;
  }
  ~Socket();
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&& other) noexcept;

  int descriptor() const {
    return descriptor_;
  }
  explicit operator bool() const {
    return descriptor_ >= 0;
  }

 private:
  static std::mutex& beginOpening();
  static void keep(int descriptor);

  int descriptor_ = -1;
};

// One that listens on all interfaces of this host, at a port that the system chooses; none where it lets nobody.
Socket listenOnAll();
// Where others reach it: "address port" of each interface, the likeliest first.
std::vector<std::string> endpointsOf(const Socket& listener);
// As one text, and back.
std::string asText(const std::vector<std::string>& endpoints);
std::vector<std::string> endpointsIn(const std::string& text);
// None if no one has connected.
Socket acceptOne(const Socket& listener);
// A connection that is being made. None if that has failed at once: `error` says why.
Socket connectTo(const std::string& endpoint, int& error);
// How that went, once the socket is writable: 0, or an errno.
int connectError(const Socket& socket);
// Whether all of it went at once.
bool sendNow(const Socket& socket, const void* data, size_t bytes);
template <typename Item>
bool sendNow(const Socket& socket, const Item& item) {
  static_assert(std::is_trivially_copyable_v<Item>);
  return sendNow(socket, &item, sizeof(item));
}

} // namespace torch_rpc_mpi
