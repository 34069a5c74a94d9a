// The one place that knows which instruction sets exist and which is in use.
#pragma once
#include <vector>

#include "api.h"

namespace sparse_ft {

std::vector<const Kernels*> available_kernels();  // what this processor can run, best first
const Kernels& active_kernels();
bool activate_kernels(const char* name);  // false: not available here

}  // namespace sparse_ft
