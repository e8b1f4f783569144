/* The MPI functions that shim.c resolves, CALL(result, name without "MPI_", parameters), in the types of the abi_*.h
 * included before. tests/unit/abi_check.c compares every line with the prototype in a real header. */
#ifndef TORCH_RPC_MPI_CALLS_H
#define TORCH_RPC_MPI_CALLS_H

/* One line per function, however long. */
/* clang-format off */
#define MPI_CALLS(CALL) \
  CALL(int, Initialized, (int* flag)) \
  CALL(int, Finalized, (int* flag)) \
  CALL(int, Query_thread, (int* provided)) \
  CALL(int, Init_thread, (int* argc, char*** argv, int required, int* provided)) \
  CALL(int, Get_library_version, (char* text, int* length)) \
  CALL(int, Error_string, (int code, char* text, int* length)) \
  CALL(int, Error_class, (int code, int* error_class)) \
  CALL(int, Comm_rank, (abi_comm comm, int* rank)) \
  CALL(int, Comm_size, (abi_comm comm, int* size)) \
  CALL(int, Comm_test_inter, (abi_comm comm, int* flag)) \
  CALL(int, Comm_idup, (abi_comm comm, abi_comm* newcomm, abi_request* request)) \
  CALL(int, Comm_free, (abi_comm* comm)) \
  CALL(int, Comm_group, (abi_comm comm, abi_group* group)) \
  CALL(int, Group_incl, (abi_group group, int count, const int ranks[], abi_group* newgroup)) \
  CALL(int, Group_free, (abi_group* group)) \
  CALL(int, Comm_create_group, (abi_comm comm, abi_group group, int tag, abi_comm* newcomm)) \
  CALL(int, Comm_set_errhandler, (abi_comm comm, abi_errhandler errhandler)) \
  CALL(int, Abort, (abi_comm comm, int code)) \
  CALL(int, Isend, (const void* data, int count, abi_datatype type, int dest, int tag, abi_comm comm, abi_request* request)) \
  CALL(int, Irecv, (void* data, int count, abi_datatype type, int source, int tag, abi_comm comm, abi_request* request)) \
  CALL(int, Test, (abi_request* request, int* flag, abi_status* status)) \
  CALL(int, Testsome, (int count, abi_request requests[], int* out_count, int indices[], abi_status statuses[])) \
  CALL(int, Cancel, (abi_request* request)) \
  CALL(int, Request_free, (abi_request* request)) \
  CALL(int, Iprobe, (int source, int tag, abi_comm comm, int* flag, abi_status* status)) \
  CALL(int, Get_count, (const abi_status* status, abi_datatype type, int* count)) \
  CALL(int, Test_cancelled, (const abi_status* status, int* flag)) \
  CALL(int, Iallgather, (const void* send, int send_count, abi_datatype send_type, void* recv, int recv_count, abi_datatype recv_type, abi_comm comm, abi_request* request)) \
  CALL(int, Ialltoallv, (const void* send, const int send_counts[], const int send_offsets[], abi_datatype send_type, void* recv, const int recv_counts[], const int recv_offsets[], abi_datatype recv_type, abi_comm comm, abi_request* request)) \
  ABI_CONVERSIONS(CALL)
/* clang-format on */

#endif
