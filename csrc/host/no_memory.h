// Memory that is lacking, with what for and how much there is: a std::bad_alloc that a user can act on.
#pragma once

#include <cstddef>
#include <new>
#include <stdexcept>
#include <string>

namespace torch_rpc_mpi {

class NoMemory : public std::bad_alloc {
 public:
  // "there is no memory for `what` of `bytes` bytes: …"
  NoMemory(const std::string& what, size_t bytes);
  const char* what() const noexcept override {
    return text_.what();
  }

 private:
  const std::runtime_error text_; // copies of it share the text, and so do not throw
};

} // namespace torch_rpc_mpi
