// Writes what the fuzzers start from: torch_rpc_mpi_fuzz_seeds tests/fuzz/corpus. To be run when formats have changed.
#include <filesystem>
#include <fstream>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/Functions.h>

#include "agent/late_calls.h"
#include "codec/outbound_rpc.h"
#include "host_device.h"
#include "python/pickle/plain_pickle_format.h"

using namespace torch_rpc_mpi;
namespace rpc = torch::distributed::rpc;

namespace {

std::filesystem::path directory;

void write(const char* fuzzer, const std::string& name, const std::string& input) {
  std::filesystem::create_directories(directory / fuzzer);
  std::ofstream(directory / fuzzer / name, std::ios::binary) << input;
}

class Nobody final : public SendFailureListener {
  void onSendFailed(FrameKind, int, uint64_t, const std::string&) noexcept override {}
};

// A message's body, how many parts it has beside it, and how many pieces of lent memory.
struct Encoded {
  std::string body;
  uint32_t parts;
  uint8_t tickets;
};

Encoded encode(
    const std::vector<at::Tensor>& tensors,
    size_t inlineLimit,
    std::shared_ptr<OutboundSlices> onDevices = nullptr) {
  Nobody nobody;
  auto message = c10::make_intrusive<rpc::Message>(
      std::vector<char>{'p', 'a', 'y'}, std::vector<at::Tensor>(tensors), rpc::MessageType::SCRIPT_CALL);
  auto pool = std::make_shared<FramePool>(size_t{1} << 16);
  OutboundRpc out(1, FrameKind::kRequest, 1, std::move(message), inlineLimit, nobody, std::move(onDevices));
  out.encode(*pool);
  while (!out.ready()) {
  }
  const FrameHeader& header = out.header();
  return {std::string(out.frame().body(), header.bodyBytes), header.bulkParts, header.tickets};
}

std::vector<std::pair<std::string, at::Tensor>> tensorsOfAllForms() {
  const at::Tensor dense = at::arange(6, at::kFloat).reshape({2, 3});
  return {
      {"plain", dense.t()},
      {"undefined", {}},
      {"conjugated", at::zeros({2}, at::kComplexFloat).conj()},
      {"gradient", at::ones({2}).set_requires_grad(true)},
      {"sparse", at::eye(2).to_sparse()},
      {"csr", at::eye(2).to_sparse_csr()},
      {"quantized", at::quantize_per_tensor(dense, 0.1, 2, at::kQInt8)},
      {"channels", at::quantize_per_channel(dense, at::ones({3}), at::zeros({3}, at::kLong), 1, at::kQInt8)},
      {"float_channels", at::quantize_per_channel(dense, at::ones({3}), at::zeros({3}), 1, at::kQUInt8)},
  };
}

void writeMessages() {
  std::vector<at::Tensor> all;
  for (const auto& [name, tensor] : tensorsOfAllForms()) {
    all.push_back(tensor);
    const Encoded inside = encode({tensor}, 1 << 10);
    const Encoded beside = encode({tensor}, 4);
    write("message", name, std::string{static_cast<char>(inside.parts), 0} + inside.body);
    write("message", name + "_beside", std::string{static_cast<char>(beside.parts), 0} + beside.body);
  }
  write("message", "all", std::string(2, '\0') + encode(all, 1 << 10).body);
}

// Steps of frames.cpp.
std::string frameAlone(FrameKind kind, const std::string& body, uint8_t choice, uint8_t callId) {
  std::string frame{static_cast<char>(choice), static_cast<char>(static_cast<uint8_t>(kind) - 1)};
  frame += static_cast<char>(body.size());
  frame += body;
  return (choice & 8U) != 0 ? frame : frame + static_cast<char>(callId);
}

std::string frame(int peer, FrameKind kind, const std::string& body, uint8_t choice = 0, uint8_t callId = 1) {
  return static_cast<char>(peer | 1 << 2) + frameAlone(kind, body, choice, callId);
}

std::string batch(int peer, const std::vector<std::string>& frames) {
  constexpr char kOfFrames = 1;
  std::string step{static_cast<char>(peer | 1 << 2), kOfFrames, static_cast<char>(FrameKind::kBatch) - 1};
  step += static_cast<char>(frames.size());
  for (const std::string& each : frames) {
    step += each;
  }
  return step + '\0';
}

const std::string turn{7 << 2};

void writeFrames() {
  constexpr uint8_t kOfLastCall = 8, kParts = 16, kInBulk = 32;
  const std::string plain = encode({}, 1 << 10).body;
  const Encoded beside = encode({at::ones({30})}, 4);
  const std::string start(1, '\0'), call{0 | 5 << 2, 1, 'x'}, chunk{0 | 4 << 2, 0};
  const auto drain = [](char kind) { return std::string{kind} + std::string(23, '\0'); };
  const auto wait = [](int quarters) { return std::string{6 << 2, static_cast<char>(quarters)}; };
  write("frames", "request", start + frame(0, FrameKind::kRequest, plain) + turn);
  write("frames", "answer", "\1" + call + frame(0, FrameKind::kResponse, plain, kOfLastCall) + turn);
  write("frames", "body_in_bulk", start + frame(1, FrameKind::kRequest, plain, kInBulk) + turn);
  // How many parts there are follows the body.
  std::string parts = frame(0, FrameKind::kRequest, beside.body, kParts);
  parts += static_cast<char>(beside.parts);
  write("frames", "parts", start + parts + turn + chunk + chunk + chunk + turn);
  write("frames", "goodbye", start + call + frame(0, FrameKind::kGoodbye, "it ends") + turn + call);
  write("frames", "credit", start + frame(2, FrameKind::kCredit, "") + turn);
  const std::string wave = frame(2, FrameKind::kDrain, drain(1)) + turn;
  const std::string verdicts =
      frame(0, FrameKind::kDrain, drain(2)) + turn + wave + frame(0, FrameKind::kDrain, drain(3)) + turn;
  write("frames", "drain", "\2" + wave + verdicts);
  // Of a call of which only the head has come, and of one that has been answered.
  const std::string forget = frame(0, FrameKind::kForget, "");
  write("frames", "forget", start + parts + forget + turn + chunk + turn + forget + turn);
  const std::string ids = writeInquiry({1, uint64_t{1} << 32});
  write("frames", "inquiry", start + parts + frame(0, FrameKind::kInquiry, ids) + turn);
  Statement statement;
  statement.business = {16, 16, 16, 0, 2.5F, {"module.function"}};
  for (const auto state : {LateCall::State::kArriving, LateCall::State::kQueued, LateCall::State::kRunning}) {
    statement.calls.push_back({uint64_t{1} << 32, state, 3, 1.5F});
  }
  const std::string said = frame(0, FrameKind::kStatement, writeStatement(statement));
  write("frames", "statement", start + call + wait(118) + said + turn + wait(4) + said);
  const std::string request = frameAlone(FrameKind::kRequest, plain, 0, 1);
  const std::string answer = frameAlone(FrameKind::kResponse, plain, kOfLastCall, 0);
  const std::string forgotten = frameAlone(FrameKind::kForget, "", 0, 1);
  write("frames", "batch", start + call + batch(0, {request, answer, forgotten}) + turn);
}

// Of a tensor on a device, to the same one of rank 1, which borrows from this one or does not.
Encoded encodeOfDevice(size_t bytes, bool borrows) {
  const auto devices = fuzz::makeDevices(/*neighbours=*/2);
  if (!devices->lender()->lendsTo(1, 0, 0) && borrows) {
    (void)devices->lender()->takeOffers();
    (void)devices->lender()->onVerdict(1, {.here = 0, .there = 0, .accepted = 1});
  }
  const std::vector<at::Tensor> tensors{fuzz::deviceTensor(0, bytes)};
  return encode(
      tensors, 1 << 10,
      std::make_shared<OutboundSlices>(devices, tensors, std::vector{devices->all().front()}, 1, /*inCurrent=*/false));
}

void writeDevices() {
  const auto step = [](const Encoded& message) {
    constexpr uint8_t kOfParts = 16, kOfTickets = 4;
    const auto choice =
        static_cast<uint8_t>((message.parts > 0 ? kOfParts : 0) | (message.tickets > 0 ? kOfTickets : 0));
    // The number of tickets is read before the id of the call, which is 1 and so are they.
    std::string result = frame(0, FrameKind::kRequest, message.body, choice);
    result += message.tickets > 0 ? std::string(1, static_cast<char>(message.tickets)) : "";
    result += message.parts > 0 ? std::string(1, static_cast<char>(message.parts)) : "";
    return result + turn;
  };
  const LendingOffer offer{.here = 0, .there = 0, .device = {'G', 'P', 'U', '1'}, .memory = {}};
  const LendingVerdict verdict{.here = 0, .there = 0, .accepted = 1};
  const LendingReturn back{.device = 0, .ticket = 1};
  const auto about = [](FrameKind kind, const auto& what) {
    const size_t bytes = std::min<size_t>(sizeof(what), UINT8_MAX); // the rest of a verdict's is zeros
    return frame(0, kind, {reinterpret_cast<const char*>(&what), bytes}, /*choice=*/1) + turn;
  };
  const std::string start(1, '\4'), call{0 | 5 << 2, static_cast<char>(1 << 6), 22};
  std::string all = start + call + turn + about(FrameKind::kOffer, offer) + about(FrameKind::kVerdict, verdict) + call;
  for (const auto& [name, bytes, borrows] :
       {std::tuple{"small", 64, false},
        {"large", 2048, false},
        {"lent", 1 << 19, true},
        {"lent_large", 1 << 23, true}}) {
    const Encoded message = encodeOfDevice(static_cast<size_t>(bytes), borrows);
    const auto first = static_cast<char>(message.parts | 4 | message.tickets << 3);
    write("message", std::string("device_") + name, std::string{first, 0} + message.body);
    write("frames", std::string("device_") + name, start + about(FrameKind::kOffer, offer) + step(message) + turn);
    all += step(message);
  }
  write("frames", "device_all", all + about(FrameKind::kReturn, back) + turn);
}

void writePickles() {
  using namespace plain_pickle;
  const std::string start(kStart), none(1, kNone), stop(1, kStop), mark(1, kMark);
  const auto text = [](const std::string& value) {
    return std::string{kShortText, static_cast<char>(value.size())} + value;
  };
  const std::string numbers = std::string{kInt1, 1, kInt2, 1, 2, kInt4, 1, 2, 3, 4} + std::string(kInt8) +
      std::string(8, '\7') + std::string{kFloat} + std::string(8, '?');
  const std::string tensor = std::string(kReceiveTensor) + std::string(kFirstTensor);
  const std::string global = text("builtins") + text("len") + std::string{kGlobal};
  const auto result = [&](const char* name, int tensors, const std::string& pickle) {
    write("plain_pickle", name, std::string{static_cast<char>(tensors << 1)} + start + pickle + stop);
  };
  result("none", 0, none);
  result("list", 0, std::string{kEmptyList} + mark + numbers + std::string{kAppends});
  result("dict", 0, std::string{kEmptyDict} + mark + text("key") + none + std::string{kSetItems});
  result("tuple", 0, mark + text("a") + std::string{kShortBytes, 1, 'b', kTrue, kFalse, kTuple});
  result("tensor", 1, tensor);
  result("tensors", 2, tensor + std::string(kMemoOfTensors) + std::string{kInt1, 1, '\x85', kReduce, '\x86'});
  const std::string call = std::string(kCallType) + global + std::string{kEmptyTuple, kEmptyDict, '\x87', kNewObject};
  write("plain_pickle", "call", std::string(1, '\1') + start + call + stop + std::string(kResendable));
}

} // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    return 2;
  }
  directory = argv[1];
  writeMessages();
  writeFrames();
  writeDevices();
  writePickles();
  return 0;
}
