// The smallest test harness that serves: named cases, checks that say what they compared, a run of all or of some.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace check {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Case {
  std::string name;
  std::function<void()> body;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, std::function<void()> body) {
    cases().push_back({name, std::move(body)});
  }
};

template <class A, class B>
void equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (!(a == b)) {
    std::ostringstream out;
    out << file << ":" << line << ": " << text << ": " << a << " is not " << b;
    throw Failure(out.str());
  }
}

inline void that(bool ok, const char* text, const char* file, int line) {
  if (!ok) {
    throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + text);
  }
}

} // namespace check

#define TEST(name)                                            \
  static void test_##name();                                  \
  static check::Register register_##name(#name, test_##name); \
  static void test_##name()
#define CHECK_THAT(condition) check::that(static_cast<bool>(condition), #condition, __FILE__, __LINE__)
#define CHECK_EQUAL(a, b) check::equal((a), (b), #a " == " #b, __FILE__, __LINE__)
#define CHECK_THROWS(expression, part)                                                                           \
  do {                                                                                                           \
    std::string caught_ = "nothing";                                                                             \
    try {                                                                                                        \
      (void)(expression);                                                                                        \
    } catch (const std::exception& error_) {                                                                     \
      caught_ = error_.what();                                                                                   \
    }                                                                                                            \
    check::that(                                                                                                 \
        caught_.find(part) != std::string::npos, (#expression " threw " + caught_).c_str(), __FILE__, __LINE__); \
  } while (false)
