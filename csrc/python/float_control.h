// How this thread's processor treats floating-point numbers: rounding, and denormals (torch.set_flush_denormal).
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace torch_rpc_mpi {

// What it is at the beginning, it is again at the end.
class KeptFloatControl {
 public:
#if defined(__SSE__)
  KeptFloatControl() = default;
  ~KeptFloatControl() {
    if (control() != before_) {
      _mm_setcsr(before_);
    }
  }

 private:
  // Without the flags that tell of results.
  static unsigned control() {
    return _mm_getcsr() & ~static_cast<unsigned>(_MM_EXCEPT_MASK);
  }

  const unsigned before_ = control();

 public:
#else
  KeptFloatControl() {
    (void)std::fegetenv(&before_);
  }
  ~KeptFloatControl() {
    (void)std::fesetenv(&before_);
  }

 private:
  std::fenv_t before_;

 public:
#endif
  KeptFloatControl(const KeptFloatControl&) = delete;
  KeptFloatControl& operator=(const KeptFloatControl&) = delete;
};

} // namespace torch_rpc_mpi
