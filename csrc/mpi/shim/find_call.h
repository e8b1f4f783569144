/* How the shims look up MPI's functions. */
#ifndef TORCH_RPC_MPI_FIND_CALL_H
#define TORCH_RPC_MPI_FIND_CALL_H

#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

/* Whether the library has that function, whose pointer is written to where `slot` points.
 * POSIX guarantees that a pointer from dlsym() may be used as a function; ISO C has no cast for it. */
static inline int find_call(void* library, const char* name, void* slot) {
  void* symbol = dlsym(library, name);
  memcpy(slot, &symbol, sizeof(symbol));
  return symbol != NULL;
}

#endif
