#include "base/error_text.h"

#include <algorithm>
#include <typeinfo>

#include <c10/util/Type.h>

namespace torch_rpc_mpi {

namespace {

ErrorTextSource theSource = nullptr;

// Of the character in UTF-8 at the beginning; 0 if there is none.
size_t characterLength(std::string_view text) {
  const auto at = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
  const auto first = at(0);
  const size_t length = first < 0x80 ? 1
      : first < 0xc2                 ? 0
      : first < 0xe0                 ? 2
      : first < 0xf0                 ? 3
      : first < 0xf5                 ? 4
                                     : 0;
  for (size_t i = 1; i < length; ++i) {
    if ((at(i) & 0xc0U) != 0x80) {
      return 0;
    }
  }
  // Longer than needed, half of a pair, or beyond the last one.
  const bool isNone = (first == 0xe0 && at(1) < 0xa0) || (first == 0xed && at(1) >= 0xa0) ||
      (first == 0xf0 && at(1) < 0x90) || (first == 0xf4 && at(1) >= 0x90);
  return isNone ? 0 : length;
}

} // namespace

void setErrorTextSource(ErrorTextSource source) {
  theSource = source;
}

std::string readableText(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  while (!bytes.empty()) {
    const size_t length = characterLength(bytes);
    text += length == 0 ? "?" : bytes.substr(0, length);
    bytes.remove_prefix(std::max<size_t>(length, 1));
  }
  return text;
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
