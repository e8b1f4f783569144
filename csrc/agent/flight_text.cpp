#include "agent/flight_text.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <string_view>
#include <utility>
#include <vector>

#include <c10/util/StringUtil.h>
#include <unistd.h>

#include "agent/request_names.h"
#include "base/flight_recorder.h"

namespace torch_rpc_mpi {

namespace rpc = torch::distributed::rpc;

namespace {

// RFC 8259, section 7. What is not ASCII stays as it is: the names of workers and functions are UTF-8.
std::string jsonString(std::string_view text) {
  std::string result = "\"";
  for (const char each : text) {
    if (each == '"' || each == '\\') {
      result += '\\';
      result += each;
    } else if (static_cast<unsigned char>(each) < 0x20) {
      std::array<char, 8> escaped{};
      std::snprintf(escaped.data(), escaped.size(), "\\u%04x", static_cast<unsigned>(each));
      result += escaped.data();
    } else {
      result += each;
    }
  }
  result += '"';
  return result;
}

// To the microsecond.
template <typename Duration>
std::string seconds(Duration time) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%.6f", std::chrono::duration<double>(time).count());
  return text.data();
}

std::string_view nameOf(CallEvent kind) {
  switch (kind) {
    case CallEvent::kMade:
      return "made";
    case CallEvent::kSent:
      return "sent";
    case CallEvent::kArrived:
      return "arrived";
    case CallEvent::kStarted:
      return "started";
    case CallEvent::kFinished:
      return "finished";
    case CallEvent::kAnswered:
      return "answered";
    case CallEvent::kCompleted:
      return "completed";
    case CallEvent::kFailed:
      return "failed";
    case CallEvent::kTimedOut:
      return "timed out";
    case CallEvent::kPeerLost:
      return "peer lost";
  }
  return "unknown";
}

std::string joined(const std::vector<std::string>& items, const char* between) {
  std::string text;
  for (const std::string& item : items) {
    text.append(text.empty() ? "" : between).append(item);
  }
  return text;
}

std::string list(const std::vector<std::string>& items) {
  return c10::str("[\n    ", joined(items, ",\n    "), "\n  ]");
}

std::string eventsText() {
  std::vector<std::string> lines;
  for (const FlightRecorder::Event& event : FlightRecorder::instance().events()) {
    lines.push_back(
        c10::str(
            R"({"time": )", seconds(event.when.time_since_epoch()), R"(, "event": ")", nameOf(event.kind),
            R"(", "peer": )", event.peer, R"(, "call": )", event.callId, R"(, "bytes": )", event.bytes,
            R"(, "type": ")", nameOfRequest(static_cast<rpc::MessageType>(event.messageType)), R"("})"));
  }
  return list(lines);
}

std::string unansweredText(const Caller& caller, Clock::time_point now) {
  std::vector<std::string> lines;
  caller.forEachUnanswered([&](const PendingCall& call) {
    lines.push_back(
        c10::str(
            R"({"call": )", call.id, R"(, "peer": )", call.peer, R"(, "type": ")", nameOfRequest(call.type),
            R"(", "age": )", seconds(now - call.made), R"(, "timeout": )", seconds(call.timeout), "}"));
  });
  return list(lines);
}

std::string runningText(const Server& server, Clock::time_point now) {
  std::vector<std::string> lines;
  server.running().forEach([&](const RunningRequests::Request& request) {
    lines.push_back(
        c10::str(
            R"({"call": )", request.callId(), R"(, "peer": )", request.peer(), R"(, "function": )",
            jsonString(request.function()), R"(, "age": )", seconds(now - request.since()), R"(, "returned_future": )",
            request.promised() ? "true" : "false", "}"));
  });
  return list(lines);
}

} // namespace

std::string flightText(
    const std::string& why,
    const Membership& members,
    const Caller& caller,
    const Server& server,
    const std::unordered_map<std::string, std::string>& metrics) {
  const auto now = Clock::now();
  std::vector<std::string> workers, lost, figures;
  for (const auto& worker : members.workers()) {
    workers.push_back(jsonString(worker.name_));
  }
  for (const Membership::Loss& loss : members.lost()) {
    lost.push_back(c10::str(R"({"rank": )", loss.rank, R"(, "reason": )", jsonString(loss.reason), "}"));
  }
  for (const auto& [name, value] : metrics) {
    figures.push_back(c10::str(jsonString(name), ": ", jsonString(value)));
  }
  std::ranges::sort(figures);
  const std::array fields{
      std::pair{"format", std::string("1")},
      std::pair{"why", jsonString(why)},
      std::pair{"time", seconds(std::chrono::system_clock::now().time_since_epoch())},
      std::pair{"worker", jsonString(members.self().name_)},
      std::pair{"rank", std::to_string(members.rank())},
      std::pair{"host", jsonString(members.host())},
      std::pair{"pid", std::to_string(getpid())},
      std::pair{"workers", c10::str("[", joined(workers, ", "), "]")},
      std::pair{"lost", list(lost)},
      std::pair{"unanswered_calls", unansweredText(caller, now)},
      std::pair{"running_requests", runningText(server, now)},
      std::pair{"metrics", c10::str("{\n    ", joined(figures, ",\n    "), "\n  }")},
      std::pair{"events", eventsText()}};
  std::vector<std::string> lines;
  for (const auto& [name, value] : fields) {
    lines.push_back(c10::str(jsonString(name), ": ", value));
  }
  return c10::str("{\n  ", joined(lines, ",\n  "), "\n}\n");
}

} // namespace torch_rpc_mpi
