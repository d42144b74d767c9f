// What binding.cpp and the kernels agree on. cpu.cpp and cuda.cu each define the four functions; neither knows PyTorch.
//
// Tensors are contiguous, of the noise each sample. "real" is what a kernel computes in: float, or double where the
// tensor is float64 (CPU only).
#pragma once
#include <cstdint>

enum class Dtype { float32, float16, bfloat16, float64 };

struct Penalty {                        // rows = N
  int64_t rows, columns;
  const void *u, *v;                    // [rows, columns], of products u . v = norm^2; backward: u alone
  void *norms, *penalty;                // real [rows], real []: mean((norm - 1)^2)
  void* partial;                        // real [rows, pieces(rows, columns)], scratch of the forward pass
  const void *d_penalty, *d_norms;      // backward: real [], real [rows] or null
  void* d_v;                            // backward: [rows, columns], the derivative by v
};

// A row is cut into pieces, of more than 512 elements, where the rows alone are too few to keep a large GPU busy:
// 1,056 blocks of 256 threads are all that 132 multiprocessors hold at once (Hopper's H100 and H200).
inline int64_t pieces(int64_t rows, int64_t columns) {
  const int64_t wanted = rows > 0 ? (1056 + rows - 1) / rows : 1, most = (columns + 1023) / 1024;
  return wanted < most ? wanted : most > 1 ? most : 1;
}

struct Adain {                          // instances = N * channels, pixels = H * W
  int64_t instances, channels, pixels;
  double eps, slope;
  const void *x, *noise;                // [instances, pixels]; null or [N, pixels] with a stride between samples
  int64_t noise_stride;
  const void *scale, *bias, *strength;  // real [instances] twice; real [1] or [channels], null without noise
  int64_t strength_stride;              // 0 or 1
  void *y, *mean, *rstd;                // [instances, pixels], real [instances] twice; the last two kept for backward
  const void* dy;                       // backward: [instances, pixels]
  void *dx, *d_scale, *d_bias, *d_strength;  // backward: [instances, pixels], real [instances] thrice (or null)
};

// How the work is given away: a CUDA stream, or a loop that runs body(begin, end, context) on all cores.
struct Where {
  void* stream;
  void (*parallel)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
};

// 0, or a CUDA error.
int penalty_forward(const Penalty&, Dtype, Where);
int penalty_backward(const Penalty&, Dtype, Where);
int adain_forward(const Adain&, Dtype, Where);
int adain_backward(const Adain&, Dtype, Where);
