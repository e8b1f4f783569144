# Imports the torch wheel under TORCH_RPC_MPI_TORCH_DIR (a directory that holds include/, lib/ and share/cmake/) as
# torch_rpc_mpi::torch and torch_rpc_mpi::torch_python.
#
# Not find_package(Torch): in a CUDA or XPU build of torch that one insists on the vendor's toolkit, which whoever
# installed torch as a wheel does not have and which nothing here uses. What must be known beyond paths are the
# definitions some of torch's class layouts depend on (USE_RPC and others) and two ABIs: that of the C++ library's
# strings, and that under which pybind11 shares types. The definitions stand in torch's own CMake files, among those of
# many targets; the ABIs are read from the libraries themselves, because only some versions' files name them.

# Ends the build. What was looked for and not found, as the end of a sentence; then a remedy, if another than a new torch.
function(_torch_is_no_good what)
  set(remedy "${ARGN}")
  if(NOT remedy)
    string(CONCAT remedy "It is damaged, or laid out in a way that this version of torch_rpc_mpi does not know: "
           "install it anew (pip install --force-reinstall), or take torch 2.6 to 2.14 from PyPI.")
  endif()
  message(FATAL_ERROR "The torch in ${TORCH_RPC_MPI_TORCH_DIR} cannot be built against: ${what}. ${remedy}")
endfunction()

# In a CUDA build several targets have definitions. Those of torch_cpu hold for whoever includes torch's headers.
function(_torch_read_definitions result)
  set(file "${TORCH_RPC_MPI_TORCH_DIR}/share/cmake/Caffe2/Caffe2Targets.cmake")
  if(NOT EXISTS "${file}")
    _torch_is_no_good("it has no ${file}")
  endif()
  file(READ "${file}" text)
  if(NOT text MATCHES "add_library\\(torch_cpu ")
    _torch_is_no_good("there is no target torch_cpu in ${file}")
  endif()
  set(definitions "")
  if(text MATCHES "set_target_properties\\(torch_cpu PROPERTIES[^)]*[ \n]INTERFACE_COMPILE_DEFINITIONS \"([^\"]*)\"")
    set(definitions "${CMAKE_MATCH_1}")
  endif()
  foreach(definition IN LISTS definitions)
    if(NOT definition MATCHES "^[A-Za-z_][A-Za-z0-9_]*(=[A-Za-z0-9_.]*)?$")
      _torch_is_no_good("'${definition}' among the definitions of torch_cpu in ${file} cannot be read")
    endif()
  endforeach()
  if(NOT "USE_RPC" IN_LIST definitions)
    string(CONCAT what "it is built without torch.distributed.rpc (USE_RPC is not among the definitions "
           "'${definitions}' of torch_cpu in ${file})")
    _torch_is_no_good("${what}" "Install one that has it, as those of PyPI for Linux do.")
  endif()
  set(${result} "${definitions}" PARENT_SCOPE)
endfunction()

# The first of a library's strings that matches.
function(_torch_read_string result library pattern)
  set(file "${TORCH_RPC_MPI_TORCH_DIR}/lib/lib${library}.so")
  if(NOT EXISTS "${file}")
    _torch_is_no_good("it has no ${file}")
  endif()
  file(STRINGS "${file}" found REGEX "${pattern}" LIMIT_COUNT 1)
  if(NOT found)
    _torch_is_no_good("nothing in ${file} matches ${pattern}")
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

_torch_read_definitions(_definitions)

# torch 2.6's CUDA builds still have the strings of GCC 4 in their interfaces. c10::Error's constructor takes one.
_torch_read_string(_error c10 "^_ZN3c105ErrorC[12]ENS_14SourceLocationE(NSt7__cxx1112basic_string|Ss)")
if(_error MATCHES "__cxx11")
  list(APPEND _definitions _GLIBCXX_USE_CXX11_ABI=1)
else()
  list(APPEND _definitions _GLIBCXX_USE_CXX11_ABI=0)
endif()

foreach(_name c10 torch_cpu torch_python)
  add_library(torch_rpc_mpi::${_name} SHARED IMPORTED)
  set_target_properties(torch_rpc_mpi::${_name} PROPERTIES
    IMPORTED_LOCATION "${TORCH_RPC_MPI_TORCH_DIR}/lib/lib${_name}.so")
endforeach()

add_library(torch_rpc_mpi::torch INTERFACE IMPORTED)
target_compile_definitions(torch_rpc_mpi::torch INTERFACE ${_definitions})
target_include_directories(torch_rpc_mpi::torch SYSTEM INTERFACE
  "${TORCH_RPC_MPI_TORCH_DIR}/include" "${TORCH_RPC_MPI_TORCH_DIR}/include/torch/csrc/api/include")
target_link_libraries(torch_rpc_mpi::torch INTERFACE torch_rpc_mpi::torch_cpu torch_rpc_mpi::c10)
target_link_libraries(torch_rpc_mpi::torch_python INTERFACE torch_rpc_mpi::torch)

# pybind11 before 3 puts the compiler's exact ABI version into the name under which extensions share their types: take
# torch's, else our compiler's differs and RpcAgent is an unknown base class. pybind11 3 compares compatible ranges.
_torch_read_string(_internals torch_python "^__pybind11_internals_v[0-9]+_[a-z]+_libstdcpp")
if(_internals MATCHES "_gcc_libstdcpp(_cxxabi[0-9]+)")
  target_compile_definitions(torch_rpc_mpi::torch_python INTERFACE
    PYBIND11_COMPILER_TYPE="_gcc" PYBIND11_STDLIB="_libstdcpp" PYBIND11_BUILD_ABI="${CMAKE_MATCH_1}")
endif()
