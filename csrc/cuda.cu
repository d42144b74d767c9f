// The kernels for CUDA. A block or a warp for a piece of a row; a block, a warp or less for an instance of AdaIN.
// 16 bytes per access where addresses allow it.
//
// Sums are taken in a fixed order and no atomics are used, so that results are the same bits on every run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

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

constexpr int MULTIPROCESSORS = 132;            // of Hopper's H100 and H200

// The sum over the THREADS threads that share an instance or a row, part of a warp or a whole block; each gets it. The
// shuffle gives a thread the value of the one whose number differs in the bit `distance`: after five, all 32 of a warp
// hold the same sum, after two each four of them theirs. All threads of a warp have to take part.
template <int THREADS> __device__ float sum(float value) {
#pragma unroll
  for (int distance = min(THREADS, 32) / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  if constexpr (THREADS > 32) {
    __shared__ float of_warp[THREADS / 32];
    __syncthreads();                                            // the sum before this one has been read
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = sum<THREADS / 32>(of_warp[threadIdx.x % (THREADS / 32)]);
  }
  return value;
}

// Work is done tile by tile, ITEMS vectors for each of THREADS threads: body(begin, count) for every tile.
template <int TILE, class Body> __device__ void each_tile(int64_t vectors, Body body) {
#pragma unroll 1                                                // two tiles at once would take too many registers
  for (int64_t begin = 0; begin < vectors; begin += TILE) body(begin, int(min(vectors - begin, int64_t(TILE))));
}
// The thread's vectors of a tile, as they are in memory, from its place `first` on. There is no branch: places beyond
// the end get the last vector again, and each_held leaves them out. The compiler moves no load across __syncwarp(): so
// all these loads are under way before what comes later waits for the first of them.
template <int THREADS, int ITEMS, class Raw>
__device__ void fetch(const Raw* from, int count, Raw (&to)[ITEMS], int first = 0) {
  int last = count - 1;
  asm volatile("" : "+r"(last));                // as if changed here: or all the min() would be kept in registers
#pragma unroll
  for (int j = 0; j < ITEMS; ++j) to[j] = from[min((first + j) * THREADS + int(threadIdx.x), last)];
  __syncwarp();
}
template <int THREADS, int ITEMS, class Body> __device__ void each_held(int count, Body body) {       // body(place, k)
#pragma unroll
  for (int j = 0; j < ITEMS; ++j)
    if (const int k = j * THREADS + int(threadIdx.x); k < count) body(j, k);
}

// Not with <<<blocks, threads>>>, which is no C++: tests/emulator has a C++ compiler take this file as it is.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, Where where, Arguments... arguments) {
  if (blocks.x == 0 || blocks.y == 0) return 0;                 // CUDA refuses an empty grid
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
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
constexpr int ROW_THREADS = 256;                // of a block, which takes one piece; or each of its warps a short row
template <int THREADS> constexpr int ROW_ITEMS = THREADS == 32 ? 7 : 4;

// How the vectors of a row are cut into pieces: a column of the grid for each, a line for each row or for eight.
struct Cut {
  int64_t vectors, length, pieces;              // length: of a piece; the last ones may be shorter, or empty

  Cut(const Penalty& p, int V) : vectors(p.columns / V), pieces(::pieces(p.rows, p.columns)) {
    length = (vectors + pieces - 1) / pieces;
  }
  dim3 blocks(const Penalty& p, int per_block) const {
    return dim3(unsigned(pieces), unsigned(std::min<int64_t>((p.rows + per_block - 1) / per_block, 65535)));
  }
};

// Calls body(row, j, begin, count) for the pieces of this block, each the j-th of its row. Its loops take any grid.
template <int THREADS, class Body> __device__ void each_piece(const Penalty& p, const Cut& cut, Body body) {
  const bool one = THREADS == ROW_THREADS;                      // row of a block: known here, it costs no register
  const int64_t step = one ? gridDim.y : int64_t(gridDim.y) * blockDim.y;
  for (int64_t row = one ? blockIdx.y : int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < p.rows; row += step)
    for (int64_t j = blockIdx.x; j < cut.pieces; j += gridDim.x)
      body(row, j, row * cut.vectors + j * cut.length, min(cut.length, cut.vectors - j * cut.length));
}

// Of warps at least two blocks per multiprocessor, up to 128 registers for a thread: without this the compiler takes
// fewer, and in float32 some loads wait for earlier ones.
template <class T, int V, int THREADS>
__global__ void __launch_bounds__(ROW_THREADS, THREADS == 32 ? 2 : 0) products(Penalty p, Cut cut) {
  each_piece<THREADS>(p, cut, [&](int64_t row, int64_t j, int64_t begin, int64_t count) {
    const auto *all_u = static_cast<const Vector<T, V>*>(p.u) + begin;
    const auto *all_v = static_cast<const Vector<T, V>*>(p.v) + begin;
    float sums[V] = {}, total = 0;
    each_tile<THREADS * ROW_ITEMS<THREADS>>(count, [&](int64_t tile, int held) {
      Vector<T, V> u[ROW_ITEMS<THREADS>], v[ROW_ITEMS<THREADS>];
      fetch<THREADS>(all_u + tile, held, u);
      fetch<THREADS>(all_v + tile, held, v);
      each_held<THREADS, ROW_ITEMS<THREADS>>(held, [&](int n, int) {
#pragma unroll
        for (int e = 0; e < V; ++e) sums[e] += to_float(u[n].at[e]) * to_float(v[n].at[e]);
      });
    });
#pragma unroll
    for (int e = 0; e < V; ++e) total += sums[e];
    total = sum<THREADS>(total);
    if (threadIdx.x == 0) static_cast<float*>(p.partial)[row * cut.pieces + j] = total;
  });
}

// `lanes` threads of a warp add up a row's partial sums: as many as there are pieces, about, a power of two.
__global__ void __launch_bounds__(1024) norms_and_penalty(Penalty p, int64_t pieces, int lanes) {
  const int lane = int(threadIdx.x) % lanes;
  float total = 0;
  for (int64_t first = 0; first < p.rows; first += 1024 / lanes) {
    const int64_t row = first + int(threadIdx.x) / lanes;
    const float* partial = static_cast<const float*>(p.partial) + row * pieces;
    float square = 0;
    if (row < p.rows)
      for (int64_t j = lane; j < pieces; j += lanes) square += partial[j];
    for (int distance = lanes / 2; distance > 0; distance /= 2)
      square += __shfl_xor_sync(0xffffffffu, square, distance);
    if (row < p.rows && lane == 0) {
      const float norm = sqrtf(square < 0 ? 0 : square);        // by rounding, where it should be 0
      static_cast<float*>(p.norms)[row] = norm;
      total += (norm - 1) * (norm - 1);
    }
  }
  total = sum<1024>(total);
  if (threadIdx.x == 0) *static_cast<float*>(p.penalty) = total / float(p.rows);   // no rows: NaN, as a mean
}

template <class T, int V, int THREADS>
__global__ void __launch_bounds__(ROW_THREADS) scaled_rows(Penalty p, Cut cut) {
  each_piece<THREADS>(p, cut, [&](int64_t row, int64_t, int64_t begin, int64_t count) {
    const auto* all_u = static_cast<const Vector<T, V>*>(p.u) + begin;
    auto* d_v = static_cast<Vector<T, V>*>(p.d_v) + begin;
    const float norm = static_cast<const float*>(p.norms)[row];
    const float d_norm = *static_cast<const float*>(p.d_penalty) * 2 * (norm - 1) / float(p.rows) +
                         (p.d_norms ? static_cast<const float*>(p.d_norms)[row] : 0);
    const float factor = norm == 0 ? 0 : d_norm / norm;         // at norm 0 the subgradient 0, as torch.norm's
    each_tile<THREADS * ROW_ITEMS<THREADS>>(count, [&](int64_t tile, int held) {
      Vector<T, V> u[ROW_ITEMS<THREADS>];
      fetch<THREADS>(all_u + tile, held, u);
      each_held<THREADS, ROW_ITEMS<THREADS>>(held, [&](int n, int k) {
#pragma unroll
        for (int e = 0; e < V; ++e) store(u[n].at[e], to_float(u[n].at[e]) * factor);
        d_v[tile + k] = u[n];
      });
    });
  });
}

// Calls f(a number of the type, elements of a vector, threads for a piece). A vector is 16 bytes where rows are whole
// vectors, else one element. Where there are eight rows for every multiprocessor, and a row fits into the registers of
// a warp, each row gets one.
template <class F> int for_rows(const Penalty& p, Dtype dtype, F f) {
  return for_dtype(dtype, [&](auto kind) {
    constexpr int V = 16 / sizeof(kind);
    const std::integral_constant<int, 32> warp{};
    const std::integral_constant<int, ROW_THREADS> block{};
    if (p.columns % V != 0 || !aligned({p.u, p.v, p.d_v}))
      return f(kind, std::integral_constant<int, 1>(), block);
    const std::integral_constant<int, V> vector{};
    return p.rows >= 8 * MULTIPROCESSORS && p.columns <= 32 * ROW_ITEMS<32> * V ? f(kind, vector, warp)
                                                                               : f(kind, vector, block);
  });
}

// ---------------------------------------------------------------------------------------- AdaIN
// How an instance is shared out: THREADS threads, each of which has ITEMS vectors of V elements in registers. They hold
// the WHOLE instance, or one tile of it after the other; then every loop over the instance reads it again.
template <class T, int V, int SHARE, int ITEMS, bool WHOLE = true> struct Layout {
  static constexpr int THREADS = SHARE, TILE = THREADS * ITEMS, MOST_THREADS = THREADS < 128 ? 128 : THREADS;
  static constexpr int64_t ROOM = WHOLE ? TILE * V : INT64_MAX;                 // pixels
  using Raw = Vector<T, V>;

  // body(place, k) for every vector: from the registers, or tile by tile loaded anew
  template <class Load, class Body> static __device__ void each_vector(int64_t vectors, Load load, Body body) {
    if constexpr (WHOLE) {
      each_held<THREADS, ITEMS>(int(vectors), body);
    } else {
      each_tile<TILE>(vectors, [&](int64_t begin, int count) {
        load(begin, count);
        each_held<THREADS, ITEMS>(count, [&](int j, int k) { body(j, begin + k); });
      });
    }
  }

  // The values of an instance before its normalisation: x + strength noise. Where there is no noise, x itself stands
  // for it, with strength 0: a branch between the loads would cost more than these do.
  struct Instance {
    int64_t vectors;
    const Raw *x, *noise;
    float strength;

    __device__ Instance(const Adain& a, int64_t i)
        : vectors(a.pixels / V),
          x(static_cast<const Raw*>(a.x) + i * vectors),
          noise(a.noise ? reinterpret_cast<const Raw*>(static_cast<const T*>(a.noise) + i / a.channels * a.noise_stride)
                        : x),
          strength(a.noise ? static_cast<const float*>(a.strength)[i % a.channels * a.strength_stride] : 0) {}

    __device__ float with_noise(T value, T z) const { return to_float(value) + strength * to_float(z); }
  };

  static __device__ void forward(const Adain& a, int64_t i) {
    const Instance in(a, i);
    float v[ITEMS][V], s = 0;
    auto load = [&](int64_t begin, int count) {
      constexpr int AT_ONCE = THREADS == 512 && ITEMS > 4 ? 4 : ITEMS;  // of the noise: 64 registers do not hold all
      Raw x[ITEMS], z[AT_ONCE];
      fetch<THREADS>(in.x + begin, count, x);
#pragma unroll
      for (int j = 0; j < ITEMS; ++j) {
        if (j % AT_ONCE == 0) fetch<THREADS>(in.noise + begin, count, z, j);
#pragma unroll
        for (int e = 0; e < V; ++e) v[j][e] = in.with_noise(x[j].at[e], z[j % AT_ONCE].at[e]);
      }
    };
    const int held = int(min(in.vectors, int64_t(TILE)));
    load(0, held);
    each_held<THREADS, ITEMS>(held, [&](int j, int) {
#pragma unroll
      for (int e = 0; e < V; ++e) s += v[j][e];
    });
    // The mean of what is held, which is all or a beginning: about it the sums below lose few digits.
    const float centre = sum<THREADS>(s) / float(held * V);
    float first = 0, second = 0;
    each_vector(in.vectors, load, [&](int j, int64_t) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float d = v[j][e] - centre;
        first += d;
        second += d * d;
      }
    });
    first = sum<THREADS>(first) / float(a.pixels);
    second = sum<THREADS>(second) / float(a.pixels);
    const float variance = second - first * first, mean = centre + first;
    const float rstd = rsqrtf((variance < 0 ? 0 : variance) + float(a.eps));        // fmaxf would hide a NaN
    const float factor = static_cast<const float*>(a.scale)[i] * rstd, bias = static_cast<const float*>(a.bias)[i];
    const float slope = float(a.slope);
    Raw* y = static_cast<Raw*>(a.y) + i * in.vectors;
    each_vector(in.vectors, load, [&](int j, int64_t k) {
      Raw result;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float normal = (v[j][e] - mean) * factor + bias;
        store(result.at[e], normal > 0 ? normal : normal * slope);
      }
      y[k] = result;
    });
    if (threadIdx.x == 0) {
      static_cast<float*>(a.mean)[i] = mean;
      static_cast<float*>(a.rstd)[i] = rstd;
    }
  }

  static __device__ void backward(const Adain& a, int64_t i) {
    const Instance in(a, i);
    const float mean = static_cast<const float*>(a.mean)[i], rstd = static_cast<const float*>(a.rstd)[i];
    const float factor = static_cast<const float*>(a.scale)[i] * rstd, bias = static_cast<const float*>(a.bias)[i];
    const float slope = float(a.slope);
    const Raw* dy = static_cast<const Raw*>(a.dy) + i * in.vectors;
    Raw* dx = static_cast<Raw*>(a.dx) + i * in.vectors;

    // The registers hold what is in memory; both loops compute from it what they need. To keep that, too, would take
    // more registers than there are.
    Raw x[ITEMS], g[ITEMS], z[ITEMS];
    auto load = [&](int64_t begin, int count) {
      fetch<THREADS>(in.x + begin, count, x);
      fetch<THREADS>(dy + begin, count, g);
      fetch<THREADS>(in.noise + begin, count, z);
    };
    auto d_normal = [&](float deviation, T d) { return to_float(d) * (deviation * factor + bias > 0 ? 1 : slope); };
    float first = 0, second = 0;
    if constexpr (WHOLE) load(0, int(in.vectors));
    each_vector(in.vectors, load, [&](int j, int64_t) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float deviation = in.with_noise(x[j].at[e], z[j].at[e]) - mean;
        const float d = d_normal(deviation, g[j].at[e]);
        first += d;
        second += d * deviation;
      }
    });
    first = sum<THREADS>(first);
    second = sum<THREADS>(second);
    const float mean_d = first / float(a.pixels), slope_d = second / float(a.pixels) * rstd * rstd;
    float d_strength = 0;
    each_vector(in.vectors, load, [&](int j, int64_t k) {
      Raw result;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float deviation = in.with_noise(x[j].at[e], z[j].at[e]) - mean;
        const float d_v = factor * (d_normal(deviation, g[j].at[e]) - mean_d - deviation * slope_d);
        d_strength += d_v * to_float(z[j].at[e]);
        store(result.at[e], d_v);
      }
      dx[k] = result;
    });
    if (a.noise) d_strength = sum<THREADS>(d_strength);
    if (threadIdx.x == 0) {
      static_cast<float*>(a.d_bias)[i] = first;
      static_cast<float*>(a.d_scale)[i] = second * rstd;
      if (a.noise) static_cast<float*>(a.d_strength)[i] = d_strength;
    }
  }
};

// Forward at least two blocks share a multiprocessor, of which one loads while the other one stores: 64 registers for
// each of 512 threads. Backward x, dy and the noise of 128x128 in float32 take 192 of its 256 KB: one block.
template <class L, bool BACKWARD>
__global__ void __launch_bounds__(L::MOST_THREADS, BACKWARD ? 1 : 2) each_instance(Adain a) {
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < a.instances; first += step) {
    // Threads without an instance take the last one again, and write the same: sum() needs whole warps.
    const int64_t i = L::THREADS > 32 ? first : min(first + threadIdx.y, a.instances - 1);
    if constexpr (BACKWARD) L::backward(a, i);
    else L::forward(a, i);
  }
}

// Launches the first of these layouts that has room for an instance.
template <bool BACKWARD, class L, class... Larger> int launch_adain(const Adain& a, Where where) {
  if constexpr (sizeof...(Larger) > 0)
    if (a.pixels > L::ROOM) return launch_adain<BACKWARD, Larger...>(a, where);
  // As many warps per block as leave a block for every multiprocessor, from one to four.
  int64_t per_block = 1;
  if constexpr (L::THREADS <= 32) {
    constexpr int OF_WARP = 32 / L::THREADS;
    per_block = OF_WARP * std::clamp<int64_t>(a.instances / OF_WARP / MULTIPROCESSORS, 1, 4);
  }
  const int64_t blocks = std::min<int64_t>((a.instances + per_block - 1) / per_block, 0x7fffffff);
  return launch(each_instance<L, BACKWARD>, dim3(unsigned(blocks)), dim3(L::THREADS, unsigned(per_block)), where, a);
}

template <class T, bool BACKWARD> int adain(const Adain& a, Where where) {
  constexpr int V = 16 / sizeof(T);
  if (a.pixels % V == 0 && (a.noise_stride * sizeof(T)) % 16 == 0 && aligned({a.x, a.noise, a.y, a.dy, a.dx}))
    return launch_adain<BACKWARD,
                        Layout<T, V, 4, 1>, Layout<T, V, 8, 1>, Layout<T, V, 16, 1>, Layout<T, V, 32, 1>,
                        Layout<T, V, 32, 8 / V>,        // 16x16
                        Layout<T, V, 32, 32 / V>,       // 32x32
                        Layout<T, V, 256, 16 / V>,      // 64x64
                        Layout<T, V, 512, 32 / V>,      // 128x128
                        Layout<T, V, 512, 8 / V, false>>(a, where);
  return launch_adain<BACKWARD, Layout<T, 1, 32, 8>, Layout<T, 1, 512, 4, false>>(a, where);
}

}  // namespace

int penalty_forward(const Penalty& p, Dtype dtype, Where where) {
  return for_rows(p, dtype, [&](auto kind, auto v, auto threads) {
    const Cut cut(p, v);
    const dim3 block(threads, ROW_THREADS / threads);
    const int error = launch(products<decltype(kind), v, threads>, cut.blocks(p, block.y), block, where, p, cut);
    int lanes = 1;
    while (lanes < 32 && 2 * lanes <= cut.pieces) lanes *= 2;
    return error ? error : launch(norms_and_penalty, dim3(1), dim3(1024), where, p, cut.pieces, lanes);
  });
}

int penalty_backward(const Penalty& p, Dtype dtype, Where where) {
  return for_rows(p, dtype, [&](auto kind, auto v, auto threads) {
    const Cut cut(p, v);
    const dim3 block(threads, ROW_THREADS / threads);
    return launch(scaled_rows<decltype(kind), v, threads>, cut.blocks(p, block.y), block, where, p, cut);
  });
}

int adain_forward(const Adain& a, Dtype dtype, Where where) {
  return for_dtype(dtype, [&](auto kind) { return adain<decltype(kind), false>(a, where); });
}

int adain_backward(const Adain& a, Dtype dtype, Where where) {
  return for_dtype(dtype, [&](auto kind) { return adain<decltype(kind), true>(a, where); });
}
