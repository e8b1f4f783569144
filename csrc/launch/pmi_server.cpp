#include "launch/pmi_server.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include <sys/socket.h>
#include <unistd.h>

#include "host/resources.h"
#include "launch/shared_files.h"

namespace torch_rpc_mpi {

namespace {

// Stated to MPI, which splits what is longer.
constexpr const char* kLimits = "kvsname_max=256 keylen_max=256 vallen_max=4096";

// A store whose holder has died fails before that is seen.
constexpr auto kLossIsSeen = std::chrono::seconds(1);

// The value of `key` in "cmd=put kvsname=a key=b value=c d". The last of a line may hold blanks.
std::string field(const std::string& line, const std::string& key, bool toTheEnd = false) {
  const std::string mark = key + "=";
  size_t begin = 0;
  while (line.compare(begin, mark.size(), mark) != 0) {
    begin = line.find(' ', begin);
    if (begin == std::string::npos) {
      throw std::invalid_argument("no " + key + " in \"" + line + "\"");
    }
    ++begin;
  }
  begin += mark.size();
  return line.substr(begin, toTheEnd ? std::string::npos : line.find(' ', begin) - begin);
}

bool writeAll(int socket, const std::string& text) {
  size_t written = 0;
  while (written < text.size()) {
    const ssize_t count = send(socket, text.data() + written, text.size() - written, MSG_NOSIGNAL);
    if (count < 0 && errno != EINTR) {
      return false;
    }
    written += count > 0 ? static_cast<size_t>(count) : 0;
  }
  return true;
}

} // namespace

PmiServer::PmiServer(
    c10::intrusive_ptr<c10d::Store> store,
    PmiPlace place,
    std::chrono::milliseconds timeout,
    std::shared_ptr<Companions> companions)
    : place_(std::move(place)),
      timeout_(timeout),
      companions_(std::move(companions)),
      store_(std::move(store)),
      whereabouts_("rank " + std::to_string(place_.rank) + " of " + std::to_string(place_.size)) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    throw std::runtime_error(std::string("cannot make a socket for PMI: ") + std::strerror(errno));
  }
  client_ = ends[0];
  server_ = ends[1];
  try {
    thread_ = startThread("PMI, which MPI asks where the other ranks are", [this] { serve(); });
  } catch (...) {
    close(client_);
    close(server_);
    throw;
  }
}

PmiServer::~PmiServer() {
  stop();
}

void PmiServer::stop() {
  if (!thread_.joinable()) {
    return;
  }
  shutdown(server_, SHUT_RDWR); // wakes the thread
  thread_.join();
  close(server_);
  // client_ stays open: it is MPI's now, and its number must not come to mean another file.
}

void PmiServer::serve() {
  std::string received;
  for (;;) {
    for (size_t end = received.find('\n'); end != std::string::npos; end = received.find('\n')) {
      const std::string line = received.substr(0, end);
      received.erase(0, end + 1);
      if (!writeAll(server_, answer(line))) {
        return;
      }
    }
    char buffer[4096];
    const ssize_t count = recv(server_, buffer, sizeof(buffer), 0);
    if (count == 0 || (count < 0 && errno != EINTR)) {
      return;
    }
    received.append(buffer, count > 0 ? static_cast<size_t>(count) : 0);
  }
}

void PmiServer::serveAlone(std::string whereabouts) {
  const std::lock_guard<std::mutex> lock(mutex_);
  store_ = nullptr;
  whereabouts_ = std::move(whereabouts);
}

void PmiServer::abort(const std::string& line) const {
  int status = EXIT_FAILURE;
  try {
    status = std::stoi(field(line, "exitcode"));
  } catch (const std::logic_error&) { // it names none that makes sense
  }
  std::fprintf(
      stderr, "torch_rpc_mpi: %s ends with status %d: MPI_Abort was called, or MPI met an error and gave up.\n",
      whereabouts_.c_str(), status);
  std::fflush(stderr);
  removeSharedFiles(place_.world);
  _exit(status);
}

std::string PmiServer::answer(const std::string& line) {
  const std::lock_guard<std::mutex> lock(mutex_);
  try {
    if (line.rfind("mcmd=", 0) == 0) {
      return ""; // a request of several lines, ended by endcmd: only spawn
    }
    if (line == "endcmd") {
      return "cmd=spawn_result rc=-1 msg=not_supported\n";
    }
    if (line.find("cmd=") == std::string::npos) {
      return ""; // within a request of several lines
    }
    const std::string command = field(line, "cmd");
    if (command == "init") {
      return "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0\n";
    }
    if (command == "get_maxes") {
      return std::string("cmd=maxes rc=0 ") + kLimits + "\n";
    }
    if (command == "get_appnum") {
      return "cmd=appnum rc=0 appnum=0\n";
    }
    if (command == "get_my_kvsname") {
      return "cmd=my_kvsname rc=0 kvsname=" + place_.world + "\n";
    }
    if (command == "get_universe_size") {
      return "cmd=universe_size rc=0 size=" + std::to_string(place_.size) + "\n";
    }
    if (command == "put") {
      return put(line);
    }
    if (command == "get") {
      return get(line);
    }
    if (command == "barrier_in") {
      barrier();
      return "cmd=barrier_out rc=0\n";
    }
    if (command == "abort") {
      abort(line);
    }
    if (command == "finalize") {
      return "cmd=finalize_ack rc=0\n";
    }
    return "cmd=" + command + "_result rc=-1 msg=not_supported\n";
  } catch (const std::exception& error) {
    // Said here, because MPI ends the process when it reads the answer.
    const auto lost = companions_->ended(kLossIsSeen);
    std::fprintf(
        stderr, "torch_rpc_mpi: rank %d of %d could not form a world: %s\"%s\": %s\n", place_.rank, place_.size,
        lost ? (*lost + " has ended. ").c_str() : "", line.substr(0, 200).c_str(), error.what());
    std::fflush(stderr);
    return "cmd=error rc=-1 msg=failed\n";
  }
}

std::string PmiServer::put(const std::string& line) {
  if (store_ != nullptr) {
    store_->set("kvs/" + field(line, "key"), field(line, "value", /*toTheEnd=*/true));
  }
  return "cmd=put_result rc=0 msg=success\n";
}

std::string PmiServer::get(const std::string& line) {
  const std::string key = field(line, "key");
  if (key == "PMI_process_mapping") {
    return "cmd=get_result rc=0 msg=success value=" + place_.mapping + "\n";
  }
  // What others have put is there since the last barrier. No waiting: MPI also asks for what may be missing.
  if (store_ == nullptr || !store_->check({"kvs/" + key})) {
    return "cmd=get_result rc=-1 msg=key_not_found value=unknown\n";
  }
  return "cmd=get_result rc=0 msg=success value=" + store_->get_to_str("kvs/" + key) + "\n";
}

void PmiServer::barrier() {
  if (store_ == nullptr) {
    return;
  }
  const std::string name = "barrier/" + std::to_string(barriers_++);
  if (store_->add(name, 1) == place_.size) {
    store_->set(name + "/passed", std::string("1"));
  }
  try {
    store_->wait({name + "/passed"}, timeout_);
  } catch (const std::exception& error) {
    throw std::runtime_error(
        "only " + std::to_string(store_->add(name, 0)) + " of " + std::to_string(place_.size) + " ranks came so far (" +
        error.what() + ")");
  }
}

} // namespace torch_rpc_mpi
