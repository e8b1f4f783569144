/* The function table that each MPI shim exports: the few MPI calls the engine makes, with handles, constants and
 * statuses in an ABI-neutral form. The extension links to no MPI; it opens the shim that fits the MPI which mpi4py has
 * loaded (design: one extension, one shim per MPI ABI) and calls through this table.
 *
 * Plain C, includes no <mpi.h>. Every function returns MPI_SUCCESS (0) or an MPI error code of that library, to be
 * turned into text by error_string(). Communicators and requests are held as the library's own handle, widened to
 * trm_handle; they are meaningful only to the shim that made them. */
#ifndef TORCH_RPC_MPI_MPI_TABLE_H
#define TORCH_RPC_MPI_MPI_TABLE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a member is added, removed or changes its meaning; checked by the extension when it opens a shim. */
#define TRM_MPI_TABLE_VERSION 3

typedef uintptr_t trm_handle;

/* Special values that the caller may pass as a source rank or compare a request with. */
#define TRM_ANY_SOURCE (-1)

enum trm_thread_level {
  TRM_THREAD_SINGLE = 0,
  TRM_THREAD_FUNNELED = 1,
  TRM_THREAD_SERIALIZED = 2,
  TRM_THREAD_MULTIPLE = 3
};

/* What a completed receive (or a matched probe) tells. For a completed send only `error` has a meaning. */
struct trm_status {
  int source; /* rank in the communicator */
  int tag;
  int error;     /* MPI_SUCCESS or an MPI error code */
  int cancelled; /* non-zero when the operation was cancelled */
  size_t bytes;  /* bytes received */
};

struct trm_mpi_table {
  uint32_t version;     /* TRM_MPI_TABLE_VERSION */
  const char* abi_name; /* "mpich", "openmpi" or "standard" */
  trm_handle comm_null;
  trm_handle request_null;

  /* Environment (MPI-4.1 sections 11.2 to 11.6). */
  int (*initialized)(int* flag);
  int (*finalized)(int* flag);
  int (*query_thread)(int* trm_level); /* an enum trm_thread_level */
  int (*init_thread)(int required_trm_level, int* provided_trm_level);
  int (*get_library_version)(char* text, size_t capacity); /* cut to capacity, always NUL-terminated */
  int (*error_string)(int code, char* text, size_t capacity);

  /* Communicators. `from_int` takes what Comm.py2f() (classic ABIs: the Fortran handle) or Comm.handle (standard
   * ABI: the handle itself) gives. */
  int (*comm_from_int)(intptr_t value, trm_handle* comm);
  int (*comm_to_int)(trm_handle comm, intptr_t* value);
  int (*comm_rank)(trm_handle comm, int* rank);
  int (*comm_size)(trm_handle comm, int* size);
  int (*comm_test_inter)(trm_handle comm, int* flag);
  int (*comm_idup)(trm_handle comm, trm_handle* newcomm, trm_handle* request);
  int (*comm_free)(trm_handle* comm);
  /* Members are ranks in `comm`; only they call it (MPI_Comm_group, MPI_Group_incl, MPI_Comm_create_group). */
  int (*comm_create_group)(trm_handle comm, int count, const int* ranks, int tag, trm_handle* newcomm);
  int (*comm_set_errors_return)(trm_handle comm); /* MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN) */
  int (*comm_abort)(trm_handle comm, int code);

  /* Point to point, always MPI_BYTE. A request handle is released (set to request_null) by the call that completes
   * it. `bytes` is at most INT_MAX. */
  int (*isend)(const void* data, size_t bytes, int dest, int tag, trm_handle comm, trm_handle* request);
  /* As isend, but where this MPI would wait in it for room or a connection, it gives up soon: *posted is then 0,
   * nothing was sent, and the same can be tried again. For one thread at a time. */
  int (
      *try_isend)(const void* data, size_t bytes, int dest, int tag, trm_handle comm, trm_handle* request, int* posted);
  int (*irecv)(void* data, size_t bytes, int source, int tag, trm_handle comm, trm_handle* request);
  int (*test)(trm_handle* request, int* flag, struct trm_status* status);
  /* MPI_Testsome over `count` requests (entries may be request_null). *out_count gets the number completed, 0 also
   * when every entry is null; indices[i] and statuses[i] describe them. Per-request errors are in statuses[i].error
   * (MPI_ERR_IN_STATUS is turned into success). Both arrays have room for `count` entries. */
  int (*testsome)(int count, trm_handle* requests, int* out_count, int* indices, struct trm_status* statuses);
  int (*cancel)(trm_handle* request); /* starts the cancellation; complete it with test() */
  int (*request_free)(trm_handle* request);
  int (*iprobe)(int source, int tag, trm_handle comm, int* flag, struct trm_status* status);

  /* Non-blocking collectives used while a group forms. Byte counts and offsets per rank. */
  int (*iallgather)(const void* send, void* recv, size_t bytes_each, trm_handle comm, trm_handle* request);
  int (*ialltoallv)(
      const void* send,
      const int* send_counts,
      const int* send_offsets,
      void* recv,
      const int* recv_counts,
      const int* recv_offsets,
      trm_handle comm,
      trm_handle* request);
};

/* Each shim exports this one symbol. `library` is a dlopen() handle through which the MPI functions are found (the
 * handle of mpi4py's own extension, so that exactly the MPI which mpi4py uses is used). Returns NULL and writes a
 * sentence to `error` when a function is missing. */
typedef const struct trm_mpi_table* (*trm_open_table_fn)(void* library, char* error, size_t error_capacity);
#define TRM_OPEN_TABLE_SYMBOL "torch_rpc_mpi_open_table"

#ifdef __cplusplus
}
#endif
#endif
