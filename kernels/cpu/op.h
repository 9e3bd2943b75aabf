// The part of Paddle's headers that an op needs. All of paddle/extension.h takes five seconds to compile per file.
#pragma once
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/ext/tensor_compat.h"
#include "paddle/phi/api/include/tensor_utils.h"
