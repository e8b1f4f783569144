#include "check.h"

#include <cstring>

#include <unistd.h>

// Runs all cases, or those whose names contain the first argument. A case that hangs is ended by SIGALRM, by name.
int main(int argc, char** argv) {
  int passed = 0;
  int failed = 0;
  for (const check::Case& test : check::cases()) {
    if (argc > 1 && test.name.find(argv[1]) == std::string::npos) {
      continue;
    }
    std::printf("%s ... ", test.name.c_str());
    std::fflush(stdout);
    alarm(120);
    try {
      test.body();
      ++passed;
      std::printf("ok\n");
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED\n  %s\n", error.what());
    }
    alarm(0);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
