/* Compares csrc/mpi/shim/abi_*.h with a real MPI header, at compile time: this file compiles or the declarations are
 * wrong. test_mpi_shims.py compiles it once per header, with -DTRM_CHECK_STANDARD for the standard ABI's <mpi_abi.h>;
 * otherwise <mpi.h> says itself whether it is Open MPI's or MPICH's. */
#include <stddef.h>
#include <stdint.h>

#ifdef TRM_CHECK_STANDARD
#include <mpi_abi.h>
#include "mpi/shim/abi_standard.h"
#else
#include <mpi.h>
#if defined(OPEN_MPI)
#include "mpi/shim/abi_openmpi.h"
#elif defined(MPICH_NUMVERSION) || defined(I_MPI_NUMVERSION)
#include "mpi/shim/abi_mpich.h"
#else
#error "neither Open MPI's nor MPICH's header"
#endif
#endif

#include "mpi/shim/calls.h"

#define SAME_SIZE(ours, theirs) _Static_assert(sizeof(ours) == sizeof(theirs), #ours " against " #theirs)
#define SAME_VALUE(ours, theirs) _Static_assert((long long)(ours) == (long long)(theirs), #ours " against " #theirs)

SAME_SIZE(abi_comm, MPI_Comm);
SAME_SIZE(abi_datatype, MPI_Datatype);
SAME_SIZE(abi_errhandler, MPI_Errhandler);
SAME_SIZE(abi_group, MPI_Group);
SAME_SIZE(abi_request, MPI_Request);
SAME_SIZE(abi_bits, MPI_Comm);
SAME_SIZE(abi_status, MPI_Status);
SAME_VALUE(_Alignof(abi_status), _Alignof(MPI_Status));
SAME_VALUE(offsetof(abi_status, source), offsetof(MPI_Status, MPI_SOURCE));
SAME_VALUE(offsetof(abi_status, tag), offsetof(MPI_Status, MPI_TAG));
SAME_VALUE(offsetof(abi_status, error), offsetof(MPI_Status, MPI_ERROR));

SAME_VALUE(0, MPI_SUCCESS);
SAME_VALUE(ABI_ANY_SOURCE, MPI_ANY_SOURCE);
SAME_VALUE(ABI_UNDEFINED, MPI_UNDEFINED);
SAME_VALUE(ABI_ERR_IN_STATUS, MPI_ERR_IN_STATUS);
#if defined(ABI_ERR_EAGAIN) && defined(MPIX_ERR_EAGAIN)
SAME_VALUE(ABI_ERR_EAGAIN, MPIX_ERR_EAGAIN);
#endif
SAME_VALUE(ABI_THREAD_SINGLE, MPI_THREAD_SINGLE);
SAME_VALUE(ABI_THREAD_FUNNELED, MPI_THREAD_FUNNELED);
SAME_VALUE(ABI_THREAD_SERIALIZED, MPI_THREAD_SERIALIZED);
SAME_VALUE(ABI_THREAD_MULTIPLE, MPI_THREAD_MULTIPLE);
_Static_assert(MPI_MAX_ERROR_STRING <= 8192, "TEXT_CAPACITY of shim.c");
_Static_assert(MPI_MAX_LIBRARY_VERSION_STRING <= 8192, "TEXT_CAPACITY of shim.c");

#ifdef OPEN_MPI
/* In this ABI our constant is the name of a symbol, whose address must be the handle. */
#define SAME_HANDLE(name, symbol, handle) \
  _Static_assert(__builtin_strcmp(name, #symbol) == 0 && (void*)&(symbol) == (void*)(handle), name)
SAME_HANDLE(ABI_COMM_NULL, ompi_mpi_comm_null, MPI_COMM_NULL);
SAME_HANDLE(ABI_REQUEST_NULL, ompi_request_null, MPI_REQUEST_NULL);
SAME_HANDLE(ABI_BYTE, ompi_mpi_byte, MPI_BYTE);
SAME_HANDLE(ABI_ERRORS_RETURN, ompi_mpi_errors_return, MPI_ERRORS_RETURN);
#else
#define SAME_HANDLE(ours, theirs) _Static_assert((uintptr_t)(ours) == (uintptr_t)(theirs), #ours " against " #theirs)
SAME_HANDLE(ABI_COMM_NULL, MPI_COMM_NULL);
SAME_HANDLE(ABI_REQUEST_NULL, MPI_REQUEST_NULL);
SAME_HANDLE(ABI_BYTE, MPI_BYTE);
SAME_HANDLE(ABI_ERRORS_RETURN, MPI_ERRORS_RETURN);
#endif

/* With the library's own types in place of ours, each prototype must be the library's. */
#define abi_comm MPI_Comm
#define abi_datatype MPI_Datatype
#define abi_errhandler MPI_Errhandler
#define abi_group MPI_Group
#define abi_request MPI_Request
#define abi_status MPI_Status
#define SAME_PROTOTYPE(result, name, parameters) \
  _Static_assert(__builtin_types_compatible_p(__typeof__(MPI_##name), result parameters), "MPI_" #name);
MPI_CALLS(SAME_PROTOTYPE)
