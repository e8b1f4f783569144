/* The MPICH ABI (libmpi.so.12): MPICH 3.4 to 5, Intel MPI, Cray MPICH, MVAPICH. Declares only what shim.c uses;
 * tests/unit/abi_check.c compares it with a real <mpi.h>. */
#ifndef TORCH_RPC_MPI_ABI_MPICH_H
#define TORCH_RPC_MPI_ABI_MPICH_H

#define ABI_NAME "mpich"

typedef int abi_comm;
typedef int abi_datatype;
typedef int abi_errhandler;
typedef int abi_group;
typedef int abi_request;

/* A handle as an unsigned integer of its own width: widening it never copies a sign bit. */
typedef unsigned abi_bits;

typedef struct {
  int count_low;
  int count_high_and_cancelled;
  int source;
  int tag;
  int error;
} abi_status;

/* Predefined handles are constants in this ABI. */
#define ABI_HANDLE(type, library, value) ((type)(value))
#define ABI_COMM_NULL 0x04000000
#define ABI_REQUEST_NULL 0x2c000000
#define ABI_BYTE 0x4c00010d
#define ABI_ERRORS_RETURN 0x54000001

enum {
  ABI_ANY_SOURCE = -2,
  ABI_UNDEFINED = -32766,
  ABI_ERR_IN_STATUS = 17,
#define ABI_ERR_EAGAIN 104 /* MPIX_ERR_EAGAIN, of MPICH 4 and later */
  ABI_THREAD_SINGLE = 0,
  ABI_THREAD_FUNNELED = 1,
  ABI_THREAD_SERIALIZED = 2,
  ABI_THREAD_MULTIPLE = 3
};

/* Here the Fortran handle is the handle itself, so no library function is needed. */
#define ABI_CONVERSIONS(CALL)
#define ABI_COMM_FROM_INT(value) ((abi_comm)(value))
#define ABI_COMM_TO_INT(comm) (comm)

#endif
