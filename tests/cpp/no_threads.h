// A scope in which no thread can be started.
#pragma once

#include <pthread.h>

#include "check.h"

class NoThreads {
 public:
  NoThreads() {
    CHECK_EQUAL(pthread_getattr_default_np(&before_), 0);
    pthread_attr_t huge = before_;
    CHECK_EQUAL(pthread_attr_setstacksize(&huge, size_t{1} << 60), 0); // no address space has room for it
    CHECK_EQUAL(pthread_setattr_default_np(&huge), 0);
  }
  ~NoThreads() {
    pthread_setattr_default_np(&before_);
  }
  NoThreads(const NoThreads&) = delete;
  NoThreads& operator=(const NoThreads&) = delete;

 private:
  pthread_attr_t before_{};
};
