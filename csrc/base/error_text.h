// What an exception says, for the texts of our own errors.
#pragma once

#include <exception>
#include <optional>
#include <string>
#include <string_view>

namespace torch_rpc_mpi {

// Its what(), or where that is empty, the name of its type. Never empty: a text that ends in ": " explains nothing.
std::string errorText(const std::exception& error);
std::string errorText(const std::exception_ptr& error);

// Bytes that came from elsewhere, as a text: what is no UTF-8 in them, of which Python could make no exception, is '?'.
std::string readableText(std::string_view bytes);

// Is asked first: for exceptions that have a text, but not in what(), as torch's python_error. Set once, before any
// other thread runs.
using ErrorTextSource = std::optional<std::string> (*)(const std::exception& error);
void setErrorTextSource(ErrorTextSource source);

} // namespace torch_rpc_mpi
