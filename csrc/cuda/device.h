// What the launchers ask of the current device. Read once a device: attributes do not change.
#pragma once

#include <cuda_runtime.h>

namespace twostep::cuda {

struct Device {
  int multiprocessors = 0;
  int shared_per_block = 0;           // dynamic, after opting in
  int shared_per_multiprocessor = 0;  // of which each resident block takes 1 KiB for the system
};

cudaError_t current_device(Device*);

}  // namespace twostep::cuda
