// The functions of kernels.h, for ctypes: dtype 0 float32, 1 float16, 2 bfloat16.
#include "kernels.h"

extern "C" {
int64_t call_pieces(int64_t rows, int64_t columns) { return pieces(rows, columns); }
int call_penalty_forward(const Penalty* p, Dtype dtype) { return penalty_forward(*p, dtype, {}); }
int call_penalty_backward(const Penalty* p, Dtype dtype) { return penalty_backward(*p, dtype, {}); }
int call_adain_forward(const Adain* a, Dtype dtype) { return adain_forward(*a, dtype, {}); }
int call_adain_backward(const Adain* a, Dtype dtype) { return adain_backward(*a, dtype, {}); }
}
