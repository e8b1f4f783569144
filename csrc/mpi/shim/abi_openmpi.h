/* The Open MPI ABI (libmpi.so.40): Open MPI 4 and 5 and what derives from them. Declares only what shim.c uses;
 * tests/unit/abi_check.c compares it with a real <mpi.h>. */
#ifndef TORCH_RPC_MPI_ABI_OPENMPI_H
#define TORCH_RPC_MPI_ABI_OPENMPI_H

#include <stddef.h>
#include <stdint.h>

#define ABI_NAME "openmpi"

typedef void* abi_comm;
typedef void* abi_datatype;
typedef void* abi_errhandler;
typedef void* abi_group;
typedef void* abi_request;

/* A handle as an unsigned integer of its own width. */
typedef uintptr_t abi_bits;

typedef struct {
  int source;
  int tag;
  int error;
  int cancelled;
  size_t count;
} abi_status;

/* Predefined handles are addresses of the library's data symbols: NULL when one is missing. */
#define ABI_HANDLE(type, library, symbol) ((type)dlsym(library, symbol))
#define ABI_COMM_NULL "ompi_mpi_comm_null"
#define ABI_REQUEST_NULL "ompi_request_null"
#define ABI_BYTE "ompi_mpi_byte"
#define ABI_ERRORS_RETURN "ompi_mpi_errors_return"

enum {
  ABI_ANY_SOURCE = -1,
  ABI_UNDEFINED = -32766,
  ABI_ERR_IN_STATUS = 18,
  ABI_THREAD_SINGLE = 0,
  ABI_THREAD_FUNNELED = 1,
  ABI_THREAD_SERIALIZED = 2,
  ABI_THREAD_MULTIPLE = 3
};

#define ABI_CONVERSIONS(CALL)           \
  CALL(abi_comm, Comm_f2c, (int value)) \
  CALL(int, Comm_c2f, (abi_comm comm))
#define ABI_COMM_FROM_INT(value) mpi.Comm_f2c((int)(value))
#define ABI_COMM_TO_INT(comm) mpi.Comm_c2f(comm)

#endif
