// The kernels for CUDA. One warp or block per instance or piece of a row; 16 bytes per access where addresses allow it.
//
// Sums are taken in a fixed order and no atomics are used, so that results are the same bits on every run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels.h"

namespace {

// -------------------------------------------------------------------------------- building blocks
__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void store(float& target, float value) { target = value; }
__device__ void store(__half& target, float value) { target = __float2half_rn(value); }
__device__ void store(__nv_bfloat16& target, float value) { target = __float2bfloat16_rn(value); }

template <class T, int V> struct alignas(sizeof(T) * V) Vector { T at[V]; };     // moved by one instruction

template <class T, int V> __device__ void read(const void* from, int64_t k, float (&values)[V]) {
  const Vector<T, V> vector = static_cast<const Vector<T, V>*>(from)[k];
#pragma unroll
  for (int e = 0; e < V; ++e) values[e] = to_float(vector.at[e]);
}

template <class T, int V> __device__ void write(void* to, int64_t k, const float (&values)[V]) {
  Vector<T, V> vector;
#pragma unroll
  for (int e = 0; e < V; ++e) store(vector.at[e], values[e]);
  static_cast<Vector<T, V>*>(to)[k] = vector;
}

// The sum over the THREADS threads that share an instance, a warp or a whole block; each of them gets it. The shuffle
// gives a thread the value of the one whose number differs in the bit `distance`: after five, all 32 of a warp hold
// the same sum.
template <int THREADS> __device__ float sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  if constexpr (THREADS > 32) {
    __shared__ float of_warp[THREADS / 32];
    __syncthreads();                                            // the sum before this one has been read
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < THREADS / 32 ? of_warp[threadIdx.x % 32] : 0;
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// Not with <<<blocks, threads>>>, which is no C++: tests/emulator has a C++ compiler take this file as it is.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, Where where, Arguments... arguments) {
  if (blocks == 0) return 0;                                    // CUDA refuses an empty grid
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min<int64_t>(blocks, 0x7fffffff)));       // kernels loop over what exceeds it
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(where.stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error) cudaGetLastError();                                // forgotten, or PyTorch would blame its next operation
  return error;
}

bool aligned(std::initializer_list<const void*> pointers) {     // to 16 bytes; null is
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

template <class F> int for_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(float());
    case Dtype::float16: return f(__half());
    case Dtype::bfloat16: return f(__nv_bfloat16());
    default: return cudaErrorInvalidValue;                      // ops.py sends nothing else
  }
}

// ----------------------------------------------------------------------------- gradient penalty
constexpr int ROW_THREADS = 256;

// Calls body(k) for the vectors k of piece number i; the block's threads share them.
template <int V, class Body> __device__ void each_vector_of_piece(const Penalty& p, int64_t i, Body body) {
  const int64_t n = pieces(p.rows, p.columns), of_row = p.columns / V, length = (of_row + n - 1) / n;
  const int64_t begin = i % n * length, end = begin + length < of_row ? begin + length : of_row;
#pragma unroll 4
  for (int64_t k = begin + threadIdx.x; k < end; k += ROW_THREADS) body(i / n * of_row + k);
}

template <class T, int V> __global__ void __launch_bounds__(ROW_THREADS) square_sums(Penalty p) {
  for (int64_t i = blockIdx.x; i < p.rows * pieces(p.rows, p.columns); i += gridDim.x) {
    float squares[V] = {}, total = 0;
    each_vector_of_piece<V>(p, i, [&](int64_t k) {
      float values[V];
      read<T, V>(p.gradient, k, values);
#pragma unroll
      for (int e = 0; e < V; ++e) squares[e] += values[e] * values[e];
    });
#pragma unroll
    for (int e = 0; e < V; ++e) total += squares[e];
    total = sum<ROW_THREADS>(total);
    if (threadIdx.x == 0) static_cast<float*>(p.partial)[i] = total;
  }
}

__global__ void __launch_bounds__(1024) norms_and_penalty(Penalty p) {
  const int64_t n = pieces(p.rows, p.columns);
  float total = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += 1024) {
    float square = 0;
    for (int64_t j = 0; j < n; ++j) square += static_cast<const float*>(p.partial)[row * n + j];
    const float norm = sqrtf(square);
    static_cast<float*>(p.norms)[row] = norm;
    total += (norm - 1) * (norm - 1);
  }
  total = sum<1024>(total);
  if (threadIdx.x == 0) *static_cast<float*>(p.penalty) = total / float(p.rows);   // no rows: NaN, as a mean
}

template <class T, int V> __global__ void __launch_bounds__(ROW_THREADS) scaled_rows(Penalty p) {
  for (int64_t i = blockIdx.x; i < p.rows * pieces(p.rows, p.columns); i += gridDim.x) {
    const int64_t row = i / pieces(p.rows, p.columns);
    const float norm = static_cast<const float*>(p.norms)[row];
    const float d_norm = *static_cast<const float*>(p.d_penalty) * 2 * (norm - 1) / float(p.rows) +
                         (p.d_norms ? static_cast<const float*>(p.d_norms)[row] : 0);
    const float factor = norm == 0 ? 0 : d_norm / norm;         // at norm 0 the subgradient 0, as torch.norm's
    each_vector_of_piece<V>(p, i, [&](int64_t k) {
      float values[V];
      read<T, V>(p.gradient, k, values);
#pragma unroll
      for (int e = 0; e < V; ++e) values[e] *= factor;
      write<T, V>(p.d_gradient, k, values);
    });
  }
}

// ---------------------------------------------------------------------------------------- AdaIN
// How an instance is shared out: SHARE threads, each with ITEMS vectors of V elements, which it keeps in registers;
// ITEMS = 0 for instances too large for that, or not aligned: they are read again for every loop over them.
template <class T, int V, int SHARE, int ITEMS> struct Layout {
  static constexpr int THREADS = SHARE, INSTANCES = THREADS == 32 ? 8 : 1;      // of a block: threadIdx.x, threadIdx.y
  static constexpr int HELD = ITEMS > 0 ? ITEMS : 1;

  // load(place, k) for every place, without a branch, so that all the loads are under way at once. Places beyond the
  // instance get its last vector again; each_held leaves these places out.
  template <class Load> static __device__ void hold(int64_t vectors, Load load) {
#pragma unroll
    for (int j = 0; j < HELD; ++j) load(j, min(int64_t(j * THREADS + int(threadIdx.x)), vectors - 1));
  }
  template <class Body> static __device__ void each_held(int64_t vectors, Body body) {          // body(place, k)
#pragma unroll
    for (int j = 0; j < HELD; ++j)
      if (const int k = j * THREADS + int(threadIdx.x); k < vectors) body(j, k);
  }
  // body(place, k) for every vector: from the registers, or loaded anew
  template <class Load, class Body> static __device__ void each_vector(int64_t vectors, Load load, Body body) {
    if constexpr (ITEMS > 0) {
      each_held(vectors, body);
    } else {
      for (int64_t k = threadIdx.x; k < vectors; k += THREADS) {
        load(0, k);
        body(0, k);
      }
    }
  }

  // The values of an instance before its normalisation: x + strength noise, then LeakyReLU.
  struct Instance {
    const T *x, *noise;
    float strength, slope_before;

    __device__ Instance(const Adain& a, int64_t i)
        : x(static_cast<const T*>(a.x) + i * a.pixels),
          noise(a.noise ? static_cast<const T*>(a.noise) + i / a.channels * a.noise_stride : nullptr),
          strength(noise ? static_cast<const float*>(a.strength)[i % a.channels * a.strength_stride] : 0),
          slope_before(float(a.slope_before)) {}

    __device__ void with_noise(int64_t k, float (&values)[V]) const {
      read<T, V>(x, k, values);
      if (!noise) return;
      float z[V];
      read<T, V>(noise, k, z);
#pragma unroll
      for (int e = 0; e < V; ++e) values[e] += strength * z[e];
    }
    __device__ float activated(float value) const { return value > 0 ? value : value * slope_before; }
  };

  static __device__ void forward(const Adain& a, int64_t i) {
    const Instance instance(a, i);
    const int64_t vectors = a.pixels / V;
    float v[HELD][V], s = 0;
    auto load = [&](int j, int64_t k) { instance.with_noise(k, v[j]); };
    hold(vectors, load);
    each_held(vectors, [&](int j, int64_t) {
#pragma unroll
      for (int e = 0; e < V; ++e) s += instance.activated(v[j][e]);
    });
    // The mean of what is held, which is all or a beginning: about it the sums below lose few digits.
    const float centre = sum<THREADS>(s) / float(min(vectors, int64_t(HELD) * THREADS) * V);
    float first = 0, second = 0;
    each_vector(vectors, load, [&](int j, int64_t) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float d = instance.activated(v[j][e]) - centre;
        first += d;
        second += d * d;
      }
    });
    first = sum<THREADS>(first) / float(a.pixels);
    second = sum<THREADS>(second) / float(a.pixels);
    const float variance = second - first * first, mean = centre + first;
    const float rstd = rsqrtf((variance < 0 ? 0 : variance) + float(a.eps));        // fmaxf would hide a NaN
    const float factor = static_cast<const float*>(a.scale)[i] * rstd, bias = static_cast<const float*>(a.bias)[i];
    const float slope = float(a.slope_after);
    T* y = static_cast<T*>(a.y) + i * a.pixels;
    each_vector(vectors, load, [&](int j, int64_t k) {
      float result[V];
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float normal = (instance.activated(v[j][e]) - mean) * factor + bias;
        result[e] = normal > 0 ? normal : normal * slope;
      }
      write<T, V>(y, k, result);
    });
    if (threadIdx.x == 0) {
      static_cast<float*>(a.mean)[i] = mean;
      static_cast<float*>(a.rstd)[i] = rstd;
    }
  }

  static __device__ void backward(const Adain& a, int64_t i) {
    const Instance instance(a, i);
    const int64_t vectors = a.pixels / V;
    const float mean = static_cast<const float*>(a.mean)[i], rstd = static_cast<const float*>(a.rstd)[i];
    const float factor = static_cast<const float*>(a.scale)[i] * rstd, bias = static_cast<const float*>(a.bias)[i];
    const float slope = float(a.slope_after);
    const T* dy = static_cast<const T*>(a.dy) + i * a.pixels;
    T* dx = static_cast<T*>(a.dx) + i * a.pixels;

    float v[HELD][V], g[HELD][V];
    auto load = [&](int j, int64_t k) {
      instance.with_noise(k, v[j]);
      read<T, V>(dy, k, g[j]);
    };
    auto d_normal = [&](float deviation, float d) { return deviation * factor + bias > 0 ? d : d * slope; };
    float first = 0, second = 0;
    if constexpr (ITEMS > 0) hold(vectors, load);
    each_vector(vectors, load, [&](int j, int64_t) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float deviation = instance.activated(v[j][e]) - mean, d = d_normal(deviation, g[j][e]);
        first += d;
        second += d * deviation;
      }
    });
    first = sum<THREADS>(first);
    second = sum<THREADS>(second);
    const float mean_d = first / float(a.pixels), slope_d = second / float(a.pixels) * rstd * rstd;
    float d_strength = 0;
    each_vector(vectors, load, [&](int j, int64_t k) {
      float result[V], z[V] = {};
      if (instance.noise) read<T, V>(instance.noise, k, z);     // again, from a cache
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float deviation = instance.activated(v[j][e]) - mean, d = d_normal(deviation, g[j][e]);
        result[e] = factor * (d - mean_d - deviation * slope_d) * (v[j][e] > 0 ? 1 : instance.slope_before);
        d_strength += result[e] * z[e];
      }
      write<T, V>(dx, k, result);
    });
    if (instance.noise) d_strength = sum<THREADS>(d_strength);
    if (threadIdx.x == 0) {
      static_cast<float*>(a.d_bias)[i] = first;
      static_cast<float*>(a.d_scale)[i] = second * rstd;
      if (instance.noise) static_cast<float*>(a.d_strength)[i] = d_strength;
    }
  }
};

template <class L, bool BACKWARD> __global__ void __launch_bounds__(L::THREADS * L::INSTANCES) each_instance(Adain a) {
  const int64_t step = int64_t(gridDim.x) * L::INSTANCES;
  for (int64_t i = int64_t(blockIdx.x) * L::INSTANCES + threadIdx.y; i < a.instances; i += step) {
    if constexpr (BACKWARD) L::backward(a, i);
    else L::forward(a, i);
  }
}

template <class T, bool BACKWARD> int adain(const Adain& a, Where where) {
  constexpr int V = 16 / sizeof(T);
  auto with = [&](auto layout) {
    using L = decltype(layout);
    const int64_t blocks = (a.instances + L::INSTANCES - 1) / L::INSTANCES;
    return launch(each_instance<L, BACKWARD>, blocks, dim3(L::THREADS, L::INSTANCES), where, a);
  };
  if (a.pixels % V == 0 && (a.noise_stride * sizeof(T)) % 16 == 0 && aligned({a.x, a.noise, a.y, a.dy, a.dx})) {
    if (a.pixels <= 32 * V) return with(Layout<T, V, 32, 1>());                 // 8x8; in 16 bits 16x16
    if (a.pixels <= 32 * 32) return with(Layout<T, V, 32, 32 / V>());           // 32x32
    if (a.pixels <= 256 * 16) return with(Layout<T, V, 256, 16 / V>());         // 64x64
    if (a.pixels <= 1024 * 16) return with(Layout<T, V, 1024, 16 / V>());       // 128x128
    return with(Layout<T, V, 512, 0>());
  }
  if (a.pixels <= 256) return with(Layout<T, 1, 32, 0>());
  return with(Layout<T, 1, 512, 0>());
}

}  // namespace

int penalty_forward(const Penalty& p, Dtype dtype, Where where) {
  return for_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    constexpr int V = 16 / sizeof(T);
    const bool whole = p.columns % V == 0 && aligned({p.gradient});
    const int64_t blocks = p.rows * pieces(p.rows, p.columns);
    const int error = launch(whole ? square_sums<T, V> : square_sums<T, 1>, blocks, dim3(ROW_THREADS), where, p);
    return error ? error : launch(norms_and_penalty, 1, dim3(1024), where, p);
  });
}

int penalty_backward(const Penalty& p, Dtype dtype, Where where) {
  return for_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    constexpr int V = 16 / sizeof(T);
    const bool whole = p.columns % V == 0 && aligned({p.gradient, p.d_gradient});
    const int64_t blocks = p.rows * pieces(p.rows, p.columns);
    return launch(whole ? scaled_rows<T, V> : scaled_rows<T, 1>, blocks, dim3(ROW_THREADS), where, p);
  });
}

int adain_forward(const Adain& a, Dtype dtype, Where where) {
  return for_dtype(dtype, [&](auto kind) { return adain<decltype(kind), false>(a, where); });
}

int adain_backward(const Adain& a, Dtype dtype, Where where) {
  return for_dtype(dtype, [&](auto kind) { return adain<decltype(kind), true>(a, where); });
}
