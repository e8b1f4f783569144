#include "agent/late_calls.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <type_traits>

namespace torch_rpc_mpi {

namespace {

template <typename Item>
void append(std::string& bytes, const Item* items, size_t count) {
  static_assert(std::is_trivially_copyable_v<Item>);
  bytes.append(reinterpret_cast<const char*>(items), count * sizeof(Item));
}

template <typename Item>
std::vector<Item> itemsIn(ConstSpan bytes) {
  const size_t count = bytes.bytes / sizeof(Item);
  if (count > kLateCallsAsked || count * sizeof(Item) != bytes.bytes) {
    throw std::runtime_error("a frame about late calls has " + std::to_string(bytes.bytes) + " bytes");
  }
  std::vector<Item> items(count);
  if (count > 0) {
    std::memcpy(items.data(), bytes.data, bytes.bytes);
  }
  return items;
}

std::string seconds(float value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.*f s", value < 10 ? 2 : 0, static_cast<double>(value));
  return text.data();
}

std::string oldestOf(const Business& business) {
  const auto& name = business.oldest;
  const std::string_view function(name.data(), static_cast<size_t>(std::ranges::find(name, '\0') - name.begin()));
  return function.empty() ? "" : " in " + std::string(function);
}

std::string busyText(const Business& business) {
  const std::string threads = std::to_string(business.workerThreads);
  if (business.running < business.workerThreads) {
    return std::to_string(business.running) + " of its " + threads + " worker threads are busy";
  }
  std::string text = (business.workerThreads == 1 ? "its only worker thread is busy"
                                                  : "all its " + threads + " worker threads are busy") +
      ", the oldest" + oldestOf(business) + " for " + seconds(business.oldestSeconds);
  if (business.waiting >= business.running) {
    text +=
        "; each of them waits for a call of its own: if those come back here, they wait for each other, and more "
        "num_worker_threads are needed, or functions of @rpc.functions.async_execution, which wait without a thread";
  }
  return text;
}

} // namespace

std::string writeInquiry(const std::vector<uint64_t>& ids) {
  std::string bytes;
  append(bytes, ids.data(), ids.size());
  return bytes;
}

std::vector<uint64_t> readInquiry(ConstSpan body) {
  return itemsIn<uint64_t>(body);
}

std::string writeStatement(const Statement& statement) {
  std::string bytes;
  append(bytes, &statement.business, 1);
  append(bytes, statement.calls.data(), statement.calls.size());
  return bytes;
}

Statement readStatement(ConstSpan body) {
  Statement statement;
  if (body.bytes < sizeof(Business)) {
    throw std::runtime_error("a statement about late calls has " + std::to_string(body.bytes) + " bytes");
  }
  std::memcpy(&statement.business, body.data, sizeof(Business));
  statement.calls = itemsIn<LateCall>({body.data + sizeof(Business), body.bytes - sizeof(Business)});
  return statement;
}

std::string notSent(const std::string& callee) {
  return "It was not sent: " + callee + " has yet to take or to begin so many earlier calls that this one waited here";
}

std::string notReady() {
  return "It was not sent: what was queued on the device of its tensors before it has yet to be done";
}

std::string whyLate(const std::string& callee, const Business& business, const LateCall& call) {
  switch (call.state) {
    case LateCall::State::kArriving:
      return "Its tensors are still on their way to " + callee;
    case LateCall::State::kQueued:
      return "On " + callee + " it waits behind " + std::to_string(call.before) +
          " other requests: " + busyText(business);
    case LateCall::State::kRunning:
      return "It has been running on " + callee + " for " + seconds(call.seconds);
    case LateCall::State::kPromised:
      return "Its function on " + callee + " has returned a future, which is not complete " + seconds(call.seconds) +
          " after it began";
    case LateCall::State::kAnswered:
      break;
  }
  return "It has been answered by " + callee + ", and the answer is still on its way";
}

} // namespace torch_rpc_mpi
