#include "codec/inbound_rpc.h"

#include <ATen/Functions.h>
#include <torch/csrc/distributed/rpc/utils.h>

#include <algorithm>
#include <functional>
#include <random>

#include "base/error_text.h"
#include "check.h"
#include "codec/not_run.h"
#include "codec/outbound_rpc.h"
#include "codec/own_copy.h"
#include "codec/receive_target.h"
#include "codec/sendable.h"
#include "codec/sparse_indices.h"
#include "codec/tensor_format.h"
#include "peer/receive_pool.h"
#include "tensor_reading.h"

using namespace torch_rpc_mpi;
using torch_rpc_mpi::testing::readAll;
namespace rpc = torch::distributed::rpc;

namespace {

at::Tensor throughTheWire(const at::Tensor& tensor) {
  auto message =
      c10::make_intrusive<rpc::Message>(std::vector<char>{}, std::vector<at::Tensor>{tensor}, rpc::SCRIPT_CALL);
  return copyMessage(*message)->tensors().at(0);
}

} // namespace

TEST(codec_keeps_every_dtype) {
  for (int8_t type = 0; type < static_cast<int8_t>(at::ScalarType::NumOptions); ++type) {
    const auto scalar = static_cast<at::ScalarType>(type);
    if (at::isQIntType(scalar) || scalar == at::ScalarType::Undefined) {
      continue;
    }
    const at::Tensor tensor = at::empty({3, 2}, at::TensorOptions().dtype(scalar));
    std::memset(tensor.data_ptr(), 0x3c, tensor.nbytes());
    const at::Tensor arrived = throughTheWire(tensor);
    CHECK_THAT(arrived.scalar_type() == scalar);
    CHECK_THAT(arrived.sizes() == tensor.sizes());
    CHECK_THAT(std::memcmp(arrived.data_ptr(), tensor.data_ptr(), tensor.nbytes()) == 0);
  }
}

TEST(codec_keeps_shapes_strides_and_flags) {
  const at::Tensor base = at::randn({20, 30});
  for (const at::Tensor& tensor : std::vector<at::Tensor>{
           base.t(), base.slice(1, 3, 25, 2), base.select(0, 4), at::randn({}), at::empty({0, 4}),
           at::randn({1}).expand({5, 7}), base.unfold(0, 3, 1), at::randn({2, 3}, at::kComplexFloat).conj(),
           at::_neg_view(base), at::randn({2, 3}, at::kComplexDouble).conj().t()}) {
    const at::Tensor arrived = throughTheWire(tensor);
    CHECK_THAT(arrived.sizes() == tensor.sizes());
    CHECK_THAT(arrived.strides() == tensor.strides());
    CHECK_THAT(arrived.is_conj() == tensor.is_conj());
    CHECK_THAT(arrived.is_neg() == tensor.is_neg());
    CHECK_THAT(at::equal(arrived.resolve_conj().resolve_neg(), tensor.resolve_conj().resolve_neg()));
  }
  CHECK_THAT(throughTheWire(at::randn({3}).requires_grad_()).requires_grad());
  CHECK_THAT(!throughTheWire(at::Tensor()).defined());
}

TEST(codec_a_view_of_a_large_storage_takes_only_what_it_shows) {
  const at::Tensor large = at::randn({1000, 1000});
  CHECK_EQUAL(throughTheWire(large[500]).storage().nbytes(), 4000U);
  CHECK_EQUAL(throughTheWire(large.select(1, 3)).storage().nbytes(), 4000U);
  CHECK_THAT(at::equal(throughTheWire(large.select(1, 3)), large.select(1, 3)));
}

TEST(codec_views_of_one_storage_still_share_it) {
  const at::Tensor base = at::arange(100, at::kFloat);
  auto message = c10::make_intrusive<rpc::Message>(
      std::vector<char>{}, std::vector<at::Tensor>{base.slice(0, 0, 60), at::ones({2}), base.slice(0, 40, 100)},
      rpc::SCRIPT_CALL);
  const auto tensors = copyMessage(*message)->tensors();
  CHECK_EQUAL(tensors[0].storage().nbytes(), 400U);
  tensors[0][50].fill_(-1);
  CHECK_EQUAL(tensors[2][10].item<float>(), -1.0F);
  CHECK_THAT(!tensors[1].storage().is_alias_of(tensors[0].storage()));
}

TEST(codec_views_of_one_storage_may_have_several_dtypes) {
  const at::Tensor bytes = at::arange(64, at::kByte);
  const at::Tensor doubles = bytes.slice(0, 8, 56).view(at::kDouble);
  for (const int64_t first : {1, 3, 8, 9}) {
    auto message = c10::make_intrusive<rpc::Message>(
        std::vector<char>{}, std::vector<at::Tensor>{bytes.slice(0, first), doubles}, rpc::SCRIPT_CALL);
    const auto tensors = copyMessage(*message)->tensors();
    CHECK_THAT(at::equal(tensors[0], bytes.slice(0, first)));
    CHECK_THAT(at::equal(tensors[1], doubles));
  }
}

TEST(codec_carries_sparse_tensors) {
  const at::Tensor dense = at::eye(5);
  CHECK_THAT(at::equal(throughTheWire(dense.to_sparse()).to_dense(), dense));
  CHECK_THAT(at::equal(throughTheWire(dense.to_sparse_csr()).to_dense(), dense));
  const at::Tensor hybrid = at::randn({4, 3, 2}).to_sparse(1);
  CHECK_THAT(at::equal(throughTheWire(hybrid).to_dense(), hybrid.to_dense()));
  const at::Tensor batch = at::stack({dense, dense.flip(0)}).to_sparse_csr();
  CHECK_THAT(at::equal(throughTheWire(batch).to_dense(), batch.to_dense()));
  const at::Tensor empty = at::zeros({3, 0}).to_sparse();
  CHECK_THAT(throughTheWire(empty).sizes() == empty.sizes());
  const at::Tensor complex = at::randn({3, 3}, at::kComplexFloat).to_sparse();
  CHECK_THAT(at::equal(throughTheWire(complex.conj()).to_dense(), complex.conj().to_dense()));
  CHECK_THAT(throughTheWire(dense.to_sparse().requires_grad_()).requires_grad());
  CHECK_THAT(throughTheWire(dense.to_sparse_csr().requires_grad_()).requires_grad());
}

TEST(codec_carries_quantized_tensors) {
  const at::Tensor quantized = at::quantize_per_tensor(at::randn({4, 4}), 0.1, 2, at::kQInt8);
  for (const at::Tensor& tensor : {quantized, quantized.t(), quantized[2]}) {
    const at::Tensor arrived = throughTheWire(tensor);
    CHECK_THAT(at::equal(arrived.int_repr(), tensor.int_repr()));
    CHECK_EQUAL(arrived.q_scale(), tensor.q_scale());
    CHECK_EQUAL(arrived.q_zero_point(), tensor.q_zero_point());
  }
  const at::Tensor values = at::randn({3, 4});
  for (const at::Tensor& zeroPoints : {at::arange(4, at::kLong), at::arange(4, at::kFloat)}) {
    const at::Tensor channels = at::quantize_per_channel(values, at::rand({4}) + 0.1, zeroPoints, 1, at::kQUInt8);
    const at::Tensor arrived = throughTheWire(channels);
    CHECK_THAT(at::equal(arrived.dequantize(), channels.dequantize()));
    CHECK_THAT(arrived.qscheme() == channels.qscheme());
  }
}

// No sender has such values, and torch would resolve them, which it can for some dtypes only.
TEST(codec_refuses_values_of_a_sparse_tensor_that_are_negated_or_conjugated) {
  const at::Tensor indices = at::zeros({1, 1}, at::kLong);
  const at::Tensor compressed = at::arange(2);
  const at::Tensor columns = at::zeros({1}, at::kLong);
  const at::Tensor complex = at::ones({1}, at::kComplexFloat);
  for (const at::Tensor& values :
       {at::_neg_view(at::ones({1}, at::kUInt16)), at::_neg_view(complex), at::conj(complex)}) {
    CHECK_THROWS(checkSparse(indices, values, {3}), "do not fit its values");
    CHECK_THROWS(checkSparseCsr(compressed, columns, values, {1, 3}), "do not fit its values");
  }
  checkSparse(indices, complex, {3});
  checkSparseCsr(compressed, columns, complex, {1, 3});
}

TEST(codec_refuses_indices_that_a_sparse_tensor_does_not_have) {
  const auto sparse = [](int64_t index) {
    const auto options = at::TensorOptions().dtype(at::kFloat).layout(at::kSparse);
    return at::_sparse_coo_tensor_unsafe(at::full({1, 2}, index, at::kLong), at::ones({2}), {3}, options);
  };
  CHECK_EQUAL(throughTheWire(sparse(2)).to_dense()[2].item<float>(), 2.0F);
  CHECK_THROWS(throughTheWire(sparse(3)), "beyond its size");
  CHECK_THROWS(throughTheWire(sparse(-1)), "beyond its size");
  for (const auto& type : {at::kInt, at::kLong}) {
    const auto csr = [&](std::vector<int64_t> rows, std::vector<int64_t> columns) {
      const auto options = at::TensorOptions().dtype(at::kFloat).layout(at::kSparseCsr);
      return at::_sparse_csr_tensor_unsafe(
          at::tensor(rows).to(type), at::tensor(columns).to(type), at::ones({2}), {2, 3}, options);
    };
    CHECK_EQUAL(throughTheWire(csr({0, 1, 2}, {0, 2})).to_dense().sum().item<float>(), 2.0F);
    CHECK_THROWS(throughTheWire(csr({0, 1, 2}, {0, 3})), "beyond its size");
    CHECK_THROWS(throughTheWire(csr({0, 1, 2}, {-1, 0})), "beyond its size");
    CHECK_THROWS(throughTheWire(csr({0, 3, 2}, {0, 2})), "beyond its size");
    CHECK_THROWS(throughTheWire(csr({0, 1, 3}, {0, 2})), "beyond its size");
    CHECK_THROWS(throughTheWire(csr({-1, 1, 2}, {0, 2})), "beyond its size");
  }
}

// What torch's own checks would find, in words that do not say whose message it was.
TEST(codec_refuses_descriptions_that_torch_has_no_tensor_for) {
  const auto edited = [](const at::Tensor& tensor, const std::function<void(std::string&)>& edit) {
    TensorWriter writer;
    writer.add({tensor});
    std::string descriptions = writer.descriptions();
    edit(descriptions);
    std::vector<at::DataPtr> storages;
    std::vector<size_t> sizes;
    for (const ConstSpan& slice : writer.slices()) {
      storages.push_back(allocateStorage(slice.bytes, false));
      sizes.push_back(slice.bytes);
    }
    Reader reader({descriptions.data(), descriptions.size()}, "the description");
    return readTensors(reader, 1, std::move(storages), sizes);
  };
  // A plain tensor: form, dtype, flags, dimensions, slice, offset, sizes.
  const auto requiresGrad = [](std::string& description) { description[2] |= kRequiresGrad; };
  CHECK_THAT(edited(at::ones({2}), requiresGrad)[0].requires_grad());
  CHECK_THROWS(edited(at::ones({2}, at::kInt), requiresGrad), "a gradient that its dtype cannot have");
  const auto grows = [](std::string& description) {
    const uint64_t huge = uint64_t{1} << 40;
    for (const size_t at : {16, 24}) {
      std::memcpy(description.data() + at, &huge, sizeof(huge));
    }
  };
  CHECK_THROWS(edited(at::ones({1}).expand({4, 4}), grows), "more elements than can be counted");
  CHECK_THROWS(edited(at::ones({1}).expand({4, 4, 0}), grows), "larger than memory can be");
}

TEST(codec_looks_once_at_an_index_that_stands_for_many) {
  constexpr int64_t kMany = int64_t{1} << 40;
  const at::Tensor tensor = at::_sparse_coo_tensor_unsafe(
      at::ones({1, 1}, at::kLong).expand({1, kMany}), at::ones({1}).expand({kMany}), {3},
      at::TensorOptions().dtype(at::kFloat).layout(at::kSparse));
  CHECK_EQUAL(throughTheWire(tensor)._nnz(), kMany);
}

TEST(codec_refuses_tensors_without_memory) {
  const auto over = [](size_t bytes, at::DataPtr data) {
    const c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), nullptr, false);
    return at::empty({0}).set_(storage, 0, {3}, {1});
  };
  CHECK_THROWS(throughTheWire(over(12, at::DataPtr(nullptr, c10::kCPU))), "no memory of its own");
  const at::Tensor freed = at::ones({3});
  freed.storage().unsafeGetStorageImpl()->set_nbytes(4);
  CHECK_THROWS(throughTheWire(freed), "shows 12 bytes of a storage that has only 4");
  CHECK_THROWS(throughTheWire(at::ones({3}, at::kMeta)), "on device \"meta\"");
  CHECK_THROWS(throughTheWire(at::ones({4, 4}).to_sparse_bsr({2, 2})), "x.to_sparse()");
  const at::Tensor packed = at::quantize_per_channel(at::ones({2, 4}), at::ones({2}), at::zeros({2}), 0, at::kQUInt4x2);
  CHECK_THROWS(throughTheWire(packed), "Send x.dequantize()");
  CHECK_THAT(at::equal(throughTheWire(at::_efficientzerotensor({3}, at::kFloat)), at::zeros({3})));
  CHECK_EQUAL(throughTheWire(bytesOf(at::ones({3}).storage())).numel(), 12);
}

TEST(codec_tells_calls_that_were_not_run_by_the_type_of_their_answer) {
  const std::string why = "a name is missing";
  const auto answer = notRunResponse(why);
  CHECK_EQUAL(whyNotRun(*copyMessage(*answer)).value(), why);
  CHECK_THAT(!whyNotRun(*rpc::createExceptionResponse(why, 3)));
  auto result = c10::make_intrusive<rpc::Message>(
      std::vector<char>(why.begin(), why.end()), std::vector<at::Tensor>(), rpc::MessageType::PYTHON_RET);
  CHECK_THAT(!whyNotRun(*result));
}

TEST(errors_always_say_something) {
  struct Silent : std::exception {
    const char* what() const noexcept override {
      return "";
    }
  };
  CHECK_EQUAL(errorText(std::runtime_error("a reason")), "a reason");
  CHECK_THAT(errorText(Silent()).find("Silent") != std::string::npos);
  CHECK_THAT(errorText(std::make_exception_ptr(Silent())).find("Silent") != std::string::npos);
  CHECK_THAT(!errorText(std::make_exception_ptr(7)).empty());
}

TEST(errors_of_others_can_be_read) {
  const std::string valid = "a \n\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80";
  CHECK_EQUAL(readableText(valid), valid);
  for (const std::string bad :
       {"\xff", "\xc3", "\xe2\x82", "\xc0\x80", "\xe0\x80\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80",
        "\xf4\x90\x80\x80"}) {
    CHECK_EQUAL(readableText("a" + bad + "b"), "a" + std::string(bad.size(), '?') + "b");
  }
}

namespace {

// A message as it arrives: the body, and the memory of its parts.
class Arrival {
 public:
  Arrival(const std::vector<at::Tensor>& tensors, size_t inlineLimit) {
    class Nobody final : public SendFailureListener {
      void onSendFailed(FrameKind, int, uint64_t, const std::string&) noexcept override {}
    } listener;
    auto message = c10::make_intrusive<rpc::Message>(
        std::vector<char>(9, 'x'), std::vector<at::Tensor>(tensors), rpc::SCRIPT_CALL);
    auto pool = std::make_shared<FramePool>(1 << 16);
    OutboundRpc out(1, FrameKind::kRequest, 3, std::move(message), inlineLimit, listener);
    out.encode(*pool);
    header = out.header();
    body.assign(out.frame().body(), header.bodyBytes);
    asSent = body;
    parts.emplace_back(9, 'x');
    TensorWriter writer;
    writer.add(tensors);
    for (const ConstSpan& slice : writer.slices()) {
      parts.emplace_back(slice.data, slice.bytes);
    }
    parts.erase(
        std::remove_if(parts.begin(), parts.end(), [&](const std::string& part) { return part.size() <= inlineLimit; }),
        parts.end());
    CHECK_EQUAL(parts.size(), header.bulkParts);
  }

  // What is decoded, where memory ends with what arrived.
  RpcMessage decode() const {
    InboundMessage in;
    in.source = 1;
    in.header = header;
    in.header.bodyBytes = body.size();
    in.separateBody.reset(new char[body.size()]);
    std::memcpy(in.separateBody.get(), body.data(), body.size());
    if (header.bulkParts > 0) {
      const size_t skip = header.bulkParts * sizeof(uint64_t);
      in.target = makeReceiveTarget({asSent.data() + skip, asSent.size() - skip});
      for (size_t i = 0; i < parts.size(); ++i) {
        std::memcpy(in.target->parts.at(i).data, parts[i].data(), parts[i].size());
      }
    }
    return decodeMessage(std::move(in));
  }

  FrameHeader header;
  std::string body;
  std::string asSent; // the body with which the parts came
  std::vector<std::string> parts;
};

void decodeAndRead(const Arrival& arrival) {
  try {
    const RpcMessage message = arrival.decode();
    for (const at::Tensor& tensor : message->tensors()) {
      readAll(tensor);
    }
  } catch (const check::Failure&) {
    throw;
  } catch (const std::exception&) { // refused, or by torch when it is read
  }
}

// Messages with a tensor of each form, and with all of them, their parts inside the body or beside it.
std::vector<Arrival> arrivals(bool together) {
  const at::Tensor dense = at::randn({3, 4});
  const at::Tensor quantized = at::quantize_per_tensor(dense, 0.1, 2, at::kQInt8);
  const at::Tensor channels = at::quantize_per_channel(dense, at::rand({4}), at::zeros({4}, at::kLong), 1, at::kQInt8);
  const at::Tensor floats = at::quantize_per_channel(dense, at::rand({4}), at::zeros({4}), 1, at::kQUInt8);
  const std::vector<at::Tensor> all = {
      dense.t(), at::eye(3).to_sparse(), at::eye(3).to_sparse_csr(), at::Tensor(), quantized, channels, floats};
  std::vector<Arrival> result;
  for (const size_t inlineLimit : {size_t{1} << 14, size_t{1}}) {
    if (together) {
      result.emplace_back(all, inlineLimit);
      continue;
    }
    for (const at::Tensor& tensor : all) {
      result.emplace_back(std::vector<at::Tensor>{tensor}, inlineLimit);
    }
  }
  return result;
}

} // namespace

// Memory of torch's and of the receive pool, not what others may know of; not while somebody else has the tensor.
TEST(codec_what_a_lost_peer_was_sent_gives_its_memory_back) {
  class Nobody final : public SendFailureListener {
    void onSendFailed(FrameKind, int, uint64_t, const std::string&) noexcept override {}
  } listener;
  constexpr int64_t kSize = 1 << 20;
  std::vector<float> foreign(kSize, 1);
  at::Tensor kept = at::ones({kSize});
  std::vector<at::Tensor> tensors{kept.slice(0, 1), at::from_blob(foreign.data(), {kSize})};
  auto message = c10::make_intrusive<rpc::Message>(std::vector<char>(), std::move(tensors), rpc::SCRIPT_CALL);
  OutboundRpc out(1, FrameKind::kRequest, 3, std::move(message), 1000, listener);
  out.encode(*std::make_shared<FramePool>(1 << 16));
  CHECK_THAT(out.releaseSource() != nullptr);
  CHECK_THAT(!out.light());
  CHECK_THAT(!out.giveBackMemory());
  CHECK_EQUAL(kept.sum().item<float>(), kSize);
  const float* memory = kept.data_ptr<float>();
  kept = at::Tensor();
  CHECK_THAT(out.giveBackMemory());
  CHECK_EQUAL(memory[kSize / 2], 0); // it is still mapped
  CHECK_EQUAL(foreign[kSize / 2], 1);
}

// Its body is too long for a frame, and holds all of its tensors.
TEST(codec_what_was_copied_into_a_long_body_is_released_already) {
  class Nobody final : public SendFailureListener {
    void onSendFailed(FrameKind, int, uint64_t, const std::string&) noexcept override {}
  } listener;
  std::vector<at::Tensor> tensors{at::ones({2500}), at::ones({2500}), at::ones({2500})};
  auto message = c10::make_intrusive<rpc::Message>(std::vector<char>(), std::move(tensors), rpc::SCRIPT_CALL);
  OutboundRpc out(1, FrameKind::kRequest, 3, std::move(message), 16384, listener);
  out.encode(*std::make_shared<FramePool>(16384));
  CHECK_EQUAL(out.header().bodyInBulk, 1);
  out.dropSource();
  CHECK_THAT(out.releaseSource() == nullptr);
  CHECK_THAT(out.giveBackMemory());
}

TEST(codec_says_who_and_what_when_a_message_ends_early) {
  for (Arrival& arrival : arrivals(/*together=*/false)) {
    CHECK_THAT(!arrival.decode()->payload().empty());
    while (!arrival.body.empty()) {
      arrival.body.pop_back();
      CHECK_THROWS(arrival.decode(), "ends early");
      CHECK_THROWS(arrival.decode(), "message 3 of rank 1");
    }
  }
}

TEST(codec_refuses_what_belongs_to_nothing) {
  for (Arrival& arrival : arrivals(/*together=*/false)) {
    arrival.body += '\0';
    CHECK_THROWS(arrival.decode(), "belong to nothing");
  }
}

TEST(codec_says_what_there_is_no_memory_for) {
  for (const at::Tensor& tensor : {at::Tensor(), at::ones({4})}) {
    const Arrival arrival({tensor}, /*inlineLimit=*/8);
    const uint64_t original = tensor.defined() ? 16 : 9; // bytes of the part that is not in the body
    const size_t skip = arrival.header.bulkParts * sizeof(uint64_t);
    std::string body = arrival.body.substr(skip);
    const auto at = body.find(std::string(reinterpret_cast<const char*>(&original), sizeof(original)));
    CHECK_THAT(at != std::string::npos);
    const uint64_t huge = uint64_t{5} << 60;
    std::memcpy(body.data() + at, &huge, sizeof(huge));
    CHECK_THROWS(makeReceiveTarget({body.data(), body.size()}), "of 5764607523034234880 bytes: this process has");
  }
}

// Each byte changed, and each eight of them overwritten with a number that is small, or larger than anything.
TEST(codec_reads_nothing_beyond_what_arrived) {
  for (const Arrival& arrival : arrivals(/*together=*/false)) {
    for (size_t at = 0; at < arrival.body.size(); ++at) {
      for (const uint8_t change : {0x81, 0xff}) {
        Arrival changed = arrival;
        changed.body[at] = static_cast<char>(changed.body[at] ^ change);
        decodeAndRead(changed);
      }
      for (const uint64_t value : {uint64_t{5}, ~uint64_t{0} >> 1}) {
        Arrival changed = arrival;
        std::memcpy(changed.body.data() + at, &value, std::min(sizeof(value), changed.body.size() - at));
        decodeAndRead(changed);
      }
    }
  }
  std::mt19937 random(13);
  const std::vector<Arrival> all = arrivals(/*together=*/true);
  for (int round = 0; round < 3000; ++round) {
    Arrival changed = all[random() % all.size()];
    for (unsigned i = random() % 4 + 1; i > 0; --i) {
      const size_t at = random() % changed.body.size();
      changed.body[at] = static_cast<char>(random() % 3 == 0 ? random() % 256 : random() % 8);
    }
    decodeAndRead(changed);
  }
}

TEST(receive_pool_reuses_bounds_and_trims) {
  ReceivePool pool(size_t{10} << 20);
  void* block = pool.allocate(3 << 20);
  pool.release(block, 3 << 20);
  CHECK_THAT(pool.allocate((3 << 20) - 100) == block);
  pool.release(block, 3 << 20);
  void* large = pool.allocate(size_t{20} << 20);
  pool.release(large, size_t{20} << 20); // above the cap: back to the system
  CHECK_EQUAL(pool.cachedBytes(), ReceivePool::classSize(3 << 20));
  pool.trim(std::chrono::steady_clock::now() + std::chrono::hours(1));
  CHECK_EQUAL(pool.cachedBytes(), 0U);
  for (const size_t bytes : {1UL, 4096UL, 4097UL, 100000UL, 2097152UL, 5000000UL, 1UL << 30}) {
    CHECK_THAT(ReceivePool::classSize(bytes) >= bytes);
    CHECK_THAT(
        ReceivePool::classSize(bytes) <= bytes + std::max<size_t>(bytes / 4, bytes >= (2 << 20) ? 2 << 20 : 4096));
  }
}
