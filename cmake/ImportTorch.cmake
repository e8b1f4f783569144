# Imports the torch wheel under TORCH_RPC_MPI_TORCH_DIR (a directory that holds include/, lib/ and share/cmake/) as
# torch_rpc_mpi::torch and torch_rpc_mpi::torch_python.
#
# Not find_package(Torch): in a CUDA or XPU build of torch that one insists on the vendor's toolkit, which whoever
# installed torch as a wheel does not have and which nothing here uses. What it knows beyond paths are the definitions
# some of torch's class layouts depend on (USE_RPC and others) and the C++ library's ABI; both are read from its files.

set(_torch_cmake "${TORCH_RPC_MPI_TORCH_DIR}/share/cmake")

function(_torch_setting result file pattern)
  file(READ "${_torch_cmake}/${file}" text)
  if(text MATCHES "${pattern}")
    set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
  else()
    set(${result} "" PARENT_SCOPE)
  endif()
endfunction()

_torch_setting(_definitions Caffe2/Caffe2Targets.cmake "INTERFACE_COMPILE_DEFINITIONS \"([A-Z][^\"\\]*)\"")
_torch_setting(_flags Torch/TorchConfig.cmake "set\\(TORCH_CXX_FLAGS \"([^\"]*)\"\\)")
if(NOT "USE_RPC" IN_LIST _definitions)
  message(FATAL_ERROR "The torch in ${TORCH_RPC_MPI_TORCH_DIR} is built without torch.distributed.rpc "
                      "(its definitions: '${_definitions}').")
endif()

foreach(_name c10 torch_cpu torch_python)
  add_library(torch_rpc_mpi::${_name} SHARED IMPORTED)
  set_target_properties(torch_rpc_mpi::${_name} PROPERTIES
    IMPORTED_LOCATION "${TORCH_RPC_MPI_TORCH_DIR}/lib/lib${_name}.so")
endforeach()

separate_arguments(_flags)
add_library(torch_rpc_mpi::torch INTERFACE IMPORTED)
target_compile_definitions(torch_rpc_mpi::torch INTERFACE ${_definitions})
target_compile_options(torch_rpc_mpi::torch INTERFACE ${_flags})
target_include_directories(torch_rpc_mpi::torch SYSTEM INTERFACE
  "${TORCH_RPC_MPI_TORCH_DIR}/include" "${TORCH_RPC_MPI_TORCH_DIR}/include/torch/csrc/api/include")
target_link_libraries(torch_rpc_mpi::torch INTERFACE torch_rpc_mpi::torch_cpu torch_rpc_mpi::c10)
target_link_libraries(torch_rpc_mpi::torch_python INTERFACE torch_rpc_mpi::torch)

# pybind11 before 3 puts the compiler's exact ABI version into the name under which extensions share their types: take
# torch's, else our compiler's differs and RpcAgent is an unknown base class. (pybind11 3 compares compatible ranges.)
file(STRINGS "${TORCH_RPC_MPI_TORCH_DIR}/lib/libtorch_python.so" _internals
  REGEX "__pybind11_internals_v[0-9]+_gcc_libstdcpp_cxxabi[0-9]+" LIMIT_COUNT 1)
if(_internals MATCHES "_gcc_libstdcpp(_cxxabi[0-9]+)")
  target_compile_definitions(torch_rpc_mpi::torch_python INTERFACE
    PYBIND11_COMPILER_TYPE="_gcc" PYBIND11_STDLIB="_libstdcpp" PYBIND11_BUILD_ABI="${CMAKE_MATCH_1}")
endif()
