#include "base/error_text.h"

#include <typeinfo>

#include <c10/util/Type.h>

namespace torch_rpc_mpi {

namespace {

ErrorTextSource theSource = nullptr;

} // namespace

void setErrorTextSource(ErrorTextSource source) {
  theSource = source;
}

std::string errorText(const std::exception& error) {
  if (theSource != nullptr) {
    if (auto text = theSource(error)) {
      return std::move(*text);
    }
  }
  std::string text = error.what();
  return text.empty() ? "an exception of type " + c10::demangle(typeid(error).name()) + ", which has no text" : text;
}

std::string errorText(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& thrown) {
    return errorText(thrown);
  } catch (...) {
    return "an exception that is no std::exception";
  }
}

} // namespace torch_rpc_mpi
