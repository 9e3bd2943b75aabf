// What an op needs of Paddle's headers. All of paddle/extension.h takes five seconds to compile, in each file that
// names it.
#pragma once
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/ext/tensor_compat.h"
#include "paddle/phi/api/include/tensor_utils.h"
