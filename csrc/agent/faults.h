// Faults that a test asks for: requests that fail instead of being sent, and requests that leave late.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include <torch/csrc/distributed/rpc/message.h>

namespace torch_rpc_mpi {

struct FaultOptions {
  // By names of message types: messageTypeNames().
  std::vector<std::string> messagesToFail;
  std::unordered_map<std::string, double> messagesToDelay; // seconds
  int numFailSends = 0;                                    // how often each message fails before it is sent
};

// The requests whose faults can be asked for, as torch calls them.
std::vector<std::string> messageTypeNames();

// Thread-safe: mutex_ guards failures_ and delayed_, the rest is immutable.
//
// A message fails as often as numFailSends says, and is sent the next time. Which message it is its type and payload
// say, so that one that torch sends again counts on, as with torch's own faulty agent.
class Faults {
 public:
  // Throws if a name is none of messageTypeNames(), or a number is negative.
  explicit Faults(const FaultOptions& options);

  // The error of this request, with torch's mark of an intentional failure; nothing if it is to be sent.
  std::optional<std::string> failureOf(const torch::distributed::rpc::Message& request);
  // Whether torch sends requests of this type once more when they have failed.
  static bool torchRetries(torch::distributed::rpc::MessageType type);
  std::chrono::milliseconds delayOf(torch::distributed::rpc::MessageType type) const;
  // Runs it when the delay is over, in a thread of its own.
  void runLater(std::chrono::milliseconds delay, std::function<void()> task);
  // Returns when all of that was run.
  void awaitDelayed();

 private:
  using MessageType = torch::distributed::rpc::MessageType;

  std::vector<MessageType> toFail_;
  std::map<MessageType, std::chrono::milliseconds> toDelay_;
  int numFailSends_;

  std::mutex mutex_;
  std::map<std::pair<MessageType, std::vector<char>>, int> failures_;
  std::vector<std::thread> delayed_;
};

} // namespace torch_rpc_mpi
