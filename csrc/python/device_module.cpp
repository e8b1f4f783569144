#include "python/device_module.h"

#include <memory>
#include <string>

#include "device/runtime.h"

namespace py = pybind11;

namespace torch_rpc_mpi {

namespace {

std::shared_ptr<const DeviceRuntime> runtimeOf(const std::string& type) {
  return DeviceRuntime::find(c10::Device(type).type());
}

} // namespace

void bindDevices(py::module_& module) {
  module.def(
      "register_device_runtime",
      [](const std::string& type, const std::string& library, const std::string& prefix) {
        DeviceRuntime::useLibrary(c10::Device(type).type(), library, prefix);
      },
      py::arg("device_type"), py::arg("library"), py::arg("prefix"));
  module.def(
      "find_device_runtime", [](const std::string& type) { return runtimeOf(type)->library(); },
      py::arg("device_type"));
  module.def(
      "can_access_peer",
      [](const std::string& type, int device, int peer) {
        const auto runtime = runtimeOf(type);
        int can = 0;
        runtime->check(runtime->table().DeviceCanAccessPeer(&can, device, peer), "DeviceCanAccessPeer");
        return can != 0;
      },
      py::arg("device_type"), py::arg("device"), py::arg("peer"));
}

} // namespace torch_rpc_mpi
