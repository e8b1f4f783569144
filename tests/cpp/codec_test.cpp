#include "codec/message_codec.h"

#include <ATen/Functions.h>

#include "base/error_text.h"
#include "check.h"
#include "codec/sendable.h"
#include "peer/receive_pool.h"

using namespace torch_rpc_mpi;
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

TEST(codec_carries_sparse_and_quantized_tensors) {
  const at::Tensor dense = at::eye(5);
  CHECK_THAT(at::equal(throughTheWire(dense.to_sparse()).to_dense(), dense));
  CHECK_THAT(at::equal(throughTheWire(dense.to_sparse_csr()).to_dense(), dense));
  const at::Tensor quantized = at::quantize_per_tensor(at::randn({4, 4}), 0.1, 2, at::kQInt8);
  const at::Tensor arrived = throughTheWire(quantized);
  CHECK_THAT(at::equal(arrived.int_repr(), quantized.int_repr()));
  CHECK_EQUAL(arrived.q_scale(), quantized.q_scale());
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
  CHECK_THAT(at::equal(throughTheWire(at::_efficientzerotensor({3}, at::kFloat)), at::zeros({3})));
  CHECK_EQUAL(throughTheWire(bytesOf(at::ones({3}).storage())).numel(), 12);
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

TEST(codec_refuses_bodies_that_lie) {
  // Every truncation and every changed byte of a real body: an error or a message, never a crash.
  auto message = c10::make_intrusive<rpc::Message>(
      std::vector<char>(9, 'x'), std::vector<at::Tensor>{at::randn({3, 4}).t(), at::eye(3).to_sparse()},
      rpc::SCRIPT_CALL);
  class Nobody final : public SendFailureListener {
   public:
    void onSendFailed(FrameKind, int, uint64_t, const std::string&) noexcept override {}
  } listener;
  auto pool = std::make_shared<FramePool>(1 << 16);
  std::string body;
  {
    OutboundRpc out(1, FrameKind::kRequest, 3, message, 1 << 14, listener);
    out.encode(*pool);
    body.assign(out.frame().body(), out.header().bodyBytes);
  }
  const auto decode = [&](const std::string& bytes) {
    InboundMessage in;
    in.header.kind = FrameKind::kRequest;
    in.header.messageType = static_cast<uint32_t>(rpc::SCRIPT_CALL);
    in.header.bodyBytes = bytes.size();
    in.separateBody.reset(new char[std::max<size_t>(bytes.size(), 1)]);
    std::memcpy(in.separateBody.get(), bytes.data(), bytes.size());
    return decodeMessage(std::move(in));
  };
  CHECK_EQUAL(decode(body)->tensors().size(), 2U);
  for (size_t length = 0; length < body.size(); ++length) {
    CHECK_THROWS(decode(body.substr(0, length)), "");
  }
  for (size_t at = 0; at < body.size(); ++at) {
    std::string changed = body;
    changed[at] = static_cast<char>(changed[at] ^ 0x81);
    try {
      decode(changed);
    } catch (const std::exception&) {
    }
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
  pool.trim(Clock::now() + std::chrono::hours(1));
  CHECK_EQUAL(pool.cachedBytes(), 0U);
  for (const size_t bytes : {1UL, 4096UL, 4097UL, 100000UL, 2097152UL, 5000000UL, 1UL << 30}) {
    CHECK_THAT(ReceivePool::classSize(bytes) >= bytes);
    CHECK_THAT(
        ReceivePool::classSize(bytes) <= bytes + std::max<size_t>(bytes / 4, bytes >= (2 << 20) ? 2 << 20 : 4096));
  }
}
