#include "device.h"

#include <array>
#include <mutex>

#include "kernels.h"
#include "launch.cuh"

namespace twostep::cuda {
namespace {

cudaError_t query(int ordinal, Device* device) {
  struct {
    int* value;
    cudaDeviceAttr attribute;
  } const wanted[] = {
      {&device->multiprocessors, cudaDevAttrMultiProcessorCount},
      {&device->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&device->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
  };
  for (const auto& each : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(each.value, each.attribute, ordinal);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t current_device(Device* device) {
  static std::mutex mutex;
  static std::array<Device, 64> known;
  int ordinal = 0;
  const cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  if (ordinal >= int(known.size())) return query(ordinal, device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (known[ordinal].multiprocessors == 0 || devices_change) {
    const cudaError_t failed = query(ordinal, &known[ordinal]);
    if (failed != cudaSuccess) return failed;
  }
  *device = known[ordinal];
  return cudaSuccess;
}

int64_t splits(int64_t batch, int64_t length, int64_t width) {
  Device device;
  // Where no device answers, the launch that follows reports it.
  if (current_device(&device) != cudaSuccess) return 1;
  const int team = team_size(ceil_div(width, elements_per_thread), heavy.max_threads);
  return runs_per_sample(device, batch, length, std::max(heavy.resident / team, 1), min_rows_backward);
}

}  // namespace twostep::cuda
