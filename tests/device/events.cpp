#include "events.h"

#include <cerrno>
#include <chrono>
#include <climits>
#include <csignal>
#include <utility>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "devices.h"

namespace rpctest {

namespace {

std::atomic<int64_t> live{0};

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Between processes, which std::atomic's wait() is not. Returns after a while in any case.
void waitForChange(std::atomic<uint32_t>& word, uint32_t old) {
  const timespec limit{0, 20'000'000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, old, &limit, nullptr, 0);
}

void wakeAll(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

bool hasEnded(pid_t process) {
  return process != 0 && process != getpid() && kill(process, 0) != 0 && errno == ESRCH;
}

} // namespace

Event::Event(std::shared_ptr<State> state, int device, unsigned flags, const Handle& handle)
    : state_(std::move(state)),
      device_(device),
      flags_(flags),
      handle_(handle) {
  ++live;
}

Event* Event::make(int device, unsigned flags) {
  if ((flags & kInterprocess) == 0) {
    return new Event(std::make_shared<State>(), device, flags, Handle{});
  }
  Handle handle{};
  handle.kind = Handle::Kind::kEvent;
  handle.device = physicalDevice(device);
  void* page = mapShared(sizeof(State), &handle);
  if (page == nullptr) {
    return nullptr;
  }
  // Its memory stays with the process: another may have it mapped, and it is a page.
  return new Event(std::shared_ptr<State>(static_cast<State*>(page), [](State*) {}), device, flags, handle);
}

Event* Event::open(const Handle& handle, int device) {
  void* page = mapShared(handle);
  if (page == nullptr) {
    return nullptr;
  }
  std::shared_ptr<State> state(static_cast<State*>(page), [handle](State* mapped) { unmapShared(mapped, handle); });
  return new Event(std::move(state), device, kInterprocess | kDisableTiming, handle);
}

void Event::destroy(Event* event) {
  --live;
  delete event;
}

Handle Event::handle() const {
  return handle_;
}

void Event::record(Stream& stream) {
  const uint32_t number = ++state_->records;
  state_->record(number).recorder = getpid();
  stream.push([state = state_, number] {
    Record& record = state->record(number);
    record.nanoseconds = now();
    record.finished = number;
    wakeAll(record.finished);
  });
}

bool Event::finished(State& state, uint32_t number) {
  // Later numbers in the same place mean that this one is long done.
  return static_cast<int32_t>(state.record(number).finished - number) >= 0;
}

// What a process that has ended had queued never happens, and nobody waits for it.
void Event::wait(State& state, uint32_t number) {
  Record& record = state.record(number);
  while (!finished(state, number) && !hasEnded(record.recorder)) {
    const uint32_t seen = record.finished;
    if (static_cast<int32_t>(seen - number) < 0) {
      waitForChange(record.finished, seen);
    }
  }
}

void Event::block(Stream& stream) const {
  const uint32_t number = state_->records;
  if (number != 0) {
    stream.push([state = state_, number] { wait(*state, number); });
  }
}

bool Event::query() const {
  const uint32_t number = state_->records;
  return number == 0 || finished(*state_, number);
}

void Event::synchronize() const {
  const uint32_t number = state_->records;
  if (number != 0) {
    wait(*state_, number);
  }
}

double Event::millisecondsSince(const Event& start) const {
  return static_cast<double>(
             state_->record(state_->records).nanoseconds - start.state_->record(start.state_->records).nanoseconds) /
      1e6;
}

int64_t liveEvents() {
  return live;
}

} // namespace rpctest
