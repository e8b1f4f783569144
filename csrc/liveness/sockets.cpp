#include "liveness/sockets.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <mutex>
#include <set>
#include <sstream>
#include <utility>

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

namespace torch_rpc_mpi {

namespace {

// Of this process. Locked while it forks, so that the child finds it whole.
std::mutex& openMutex() {
  static auto* mutex = new std::mutex();
  return *mutex;
}

std::set<int>& openSockets() {
  static auto* sockets = new std::set<int>();
  return *sockets;
}

void closeInForkedChildren() {
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(
        [] { openMutex().lock(); }, [] { openMutex().unlock(); },
        [] {
          for (const int descriptor : openSockets()) {
            ::close(descriptor);
          }
          openSockets().clear();
          openMutex().unlock();
        });
  });
}

void closeOwn(int descriptor) {
  if (descriptor < 0) {
    return;
  }
  const std::lock_guard<std::mutex> lock(openMutex());
  if (openSockets().erase(descriptor) > 0) { // else this is a child, where it may be somebody else's by now
    ::close(descriptor);
  }
}

constexpr int kFlags = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;

Socket listenOn(const sockaddr* address, socklen_t bytes) {
  Socket socket = Socket::from([&] { return ::socket(address->sa_family, kFlags, 0); });
  const int no = 0;
  if (address->sa_family == AF_INET6 &&
      ::setsockopt(socket.descriptor(), IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof(no)) != 0) {
    return {};
  }
  if (!socket || ::bind(socket.descriptor(), address, bytes) != 0 || ::listen(socket.descriptor(), 64) != 0) {
    return {};
  }
  return socket;
}

std::string textOf(const sockaddr* address, const std::string& port) {
  std::array<char, INET6_ADDRSTRLEN> text{};
  const void* bytes = address->sa_family == AF_INET
      ? static_cast<const void*>(&reinterpret_cast<const sockaddr_in*>(address)->sin_addr)
      : static_cast<const void*>(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
  return ::inet_ntop(address->sa_family, bytes, text.data(), text.size()) == nullptr
      ? ""
      : std::string(text.data()) + " " + port;
}

} // namespace

std::mutex& Socket::beginOpening() {
  closeInForkedChildren();
  return openMutex();
}

void Socket::keep(int descriptor) {
  if (descriptor >= 0) {
    openSockets().insert(descriptor);
  }
}

Socket::~Socket() {
  closeOwn(descriptor_);
}

Socket::Socket(Socket&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}

Socket& Socket::operator=(Socket&& other) noexcept {
  if (this != &other) {
    closeOwn(descriptor_);
    descriptor_ = std::exchange(other.descriptor_, -1);
  }
  return *this;
}

Socket listenOnAll() {
  sockaddr_in6 both{}; // takes connections of IPv4 too
  both.sin6_family = AF_INET6;
  both.sin6_addr = in6addr_any;
  Socket socket = listenOn(reinterpret_cast<const sockaddr*>(&both), sizeof(both));
  if (socket) {
    return socket;
  }
  sockaddr_in old{};
  old.sin_family = AF_INET;
  old.sin_addr.s_addr = htonl(INADDR_ANY);
  return listenOn(reinterpret_cast<const sockaddr*>(&old), sizeof(old));
}

std::vector<std::string> endpointsOf(const Socket& listener) {
  sockaddr_storage own{};
  socklen_t bytes = sizeof(own);
  ifaddrs* interfaces = nullptr;
  if (!listener || ::getsockname(listener.descriptor(), reinterpret_cast<sockaddr*>(&own), &bytes) != 0 ||
      ::getifaddrs(&interfaces) != 0) {
    return {};
  }
  const bool both = own.ss_family == AF_INET6;
  const std::string port = std::to_string(ntohs(
      both ? reinterpret_cast<const sockaddr_in6&>(own).sin6_port
           : reinterpret_cast<const sockaddr_in&>(own).sin_port));
  std::array<std::vector<std::string>, 3> found; // IPv4, IPv6, and last what leads to processes of this host alone
  for (const ifaddrs* each = interfaces; each != nullptr; each = each->ifa_next) {
    const sockaddr* address = each->ifa_addr;
    if (address == nullptr || (each->ifa_flags & IFF_UP) == 0) {
      continue;
    }
    const bool loopback = (each->ifa_flags & IFF_LOOPBACK) != 0;
    if (address->sa_family == AF_INET) {
      found[loopback ? 2 : 0].push_back(textOf(address, port));
    } else if (
        address->sa_family == AF_INET6 && both && !loopback &&
        !IN6_IS_ADDR_LINKLOCAL(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr)) {
      found[1].push_back(textOf(address, port));
    }
  }
  ::freeifaddrs(interfaces);
  std::vector<std::string> endpoints;
  for (const auto& kind : found) {
    endpoints.insert(endpoints.end(), kind.begin(), kind.end());
  }
  return endpoints;
}

std::string asText(const std::vector<std::string>& endpoints) {
  std::string text;
  for (const std::string& endpoint : endpoints) {
    text += (text.empty() ? "" : ",") + endpoint;
  }
  return text;
}

std::vector<std::string> endpointsIn(const std::string& text) {
  std::vector<std::string> endpoints;
  std::istringstream parts(text);
  for (std::string endpoint; std::getline(parts, endpoint, ',');) {
    endpoints.push_back(endpoint);
  }
  return endpoints;
}

Socket acceptOne(const Socket& listener) {
  return Socket::from([&] { return ::accept4(listener.descriptor(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC); });
}

Socket connectTo(const std::string& endpoint, int& error) {
  error = EINVAL;
  const size_t space = std::min(endpoint.find(' '), endpoint.size());
  const std::string host = endpoint.substr(0, space);
  const auto port = htons(static_cast<uint16_t>(std::strtoul(endpoint.c_str() + space, nullptr, 10)));
  sockaddr_in old{};
  sockaddr_in6 recent{};
  const sockaddr* address = nullptr;
  socklen_t bytes = 0;
  if (::inet_pton(AF_INET, host.c_str(), &old.sin_addr) == 1) {
    old.sin_family = AF_INET;
    old.sin_port = port;
    address = reinterpret_cast<const sockaddr*>(&old);
    bytes = sizeof(old);
  } else if (::inet_pton(AF_INET6, host.c_str(), &recent.sin6_addr) == 1) {
    recent.sin6_family = AF_INET6;
    recent.sin6_port = port;
    address = reinterpret_cast<const sockaddr*>(&recent);
    bytes = sizeof(recent);
  } else {
    return {};
  }
  Socket socket = Socket::from([&] { return ::socket(address->sa_family, kFlags, 0); });
  if (socket && (::connect(socket.descriptor(), address, bytes) == 0 || errno == EINPROGRESS)) {
    error = 0;
    const int one = 1;
    (void)::setsockopt(socket.descriptor(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    return socket;
  }
  error = errno;
  return {};
}

int connectError(const Socket& socket) {
  int error = 0;
  socklen_t bytes = sizeof(error);
  return ::getsockopt(socket.descriptor(), SOL_SOCKET, SO_ERROR, &error, &bytes) == 0 ? error : errno;
}

bool sendNow(const Socket& socket, const void* data, size_t bytes) {
  return ::send(socket.descriptor(), data, bytes, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
}

} // namespace torch_rpc_mpi
