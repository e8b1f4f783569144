/* The standard ABI of MPI-5 (libmpi_abi.so.1): MPICH 5, Intel MPI 2021.17, Open MPI 6, and later ones. Declares only
 * what shim.c uses; tests/unit/abi_check.c compares it with a real <mpi_abi.h>. */
#ifndef TORCH_RPC_MPI_ABI_STANDARD_H
#define TORCH_RPC_MPI_ABI_STANDARD_H

#include <stdint.h>

#define ABI_NAME "standard"

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
  int reserved[5];
} abi_status;

/* Predefined handles are small integers in pointer form. */
#define ABI_HANDLE(type, library, value) ((type)(value))
#define ABI_COMM_NULL 0x100
#define ABI_REQUEST_NULL 0x180
#define ABI_BYTE 0x247
#define ABI_ERRORS_RETURN 0x143

enum {
  ABI_ANY_SOURCE = -1,
  ABI_UNDEFINED = -32766,
  ABI_ERR_IN_STATUS = 19,
  ABI_THREAD_SINGLE = 0,
  ABI_THREAD_FUNNELED = 1024,
  ABI_THREAD_SERIALIZED = 2048,
  ABI_THREAD_MULTIPLE = 4096
};

/* The handle itself, as mpi4py's Comm.handle gives it, and not what MPI_Comm_toint makes of it: Intel MPI 2021.18 does
 * not find its way back from that to a communicator that is not predefined. */
#define ABI_CONVERSIONS(CALL)
#define ABI_COMM_FROM_INT(value) ((abi_comm)(value))
#define ABI_COMM_TO_INT(comm) ((intptr_t)(comm))

#endif
