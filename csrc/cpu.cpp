// The kernels for the CPU. Loops over one instance vectorise; rows and instances spread over the cores.
//
// Every sum runs in an order that depends on the shape alone: results are the same bits on any number of threads.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// ------------------------------------------------------------------------------ 16-bit numbers
// By their bits, because compilers vectorise that everywhere.
template <class To, class From> To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

struct Half {
  uint16_t raw;
  operator float() const {
    const uint32_t exponent = raw & 0x7c00u, magnitude = (raw & 0x7fffu) << 13, sign = (raw & 0x8000u) << 16;
    const uint32_t tiny = bits<uint32_t>(bits<float>(magnitude + (113u << 23)) - 0x1p-14f);     // below 2^-14
    const uint32_t normal = magnitude + (112u << 23), large = magnitude | 0x7f800000u;          // large: infinity, NaN
    return bits<float>(sign | (exponent == 0x7c00u ? large : exponent == 0 ? tiny : normal));
  }
  Half& operator=(float value) {                                                // rounds to nearest even
    const uint32_t all = bits<uint32_t>(value), sign = all & 0x80000000u, x = all ^ sign;
    const uint32_t small = bits<uint32_t>(bits<float>(x) + 0.5f) - bits<uint32_t>(0.5f);        // below 2^-14
    const uint32_t normal = (x + ((15u - 127u) << 23) + 0xfffu + (x >> 13 & 1u)) >> 13;
    const uint32_t large = x > 0x7f800000u ? 0x7e00u : 0x7c00u;                                 // NaN, infinity
    raw = uint16_t(sign >> 16 | (x >= 0x47800000u ? large : x < 0x38800000u ? small : normal));
    return *this;
  }
};

struct BFloat {
  uint16_t raw;
  operator float() const { return bits<float>(uint32_t(raw) << 16); }
  BFloat& operator=(float value) {
    const uint32_t x = bits<uint32_t>(value);
    raw = uint16_t(value != value ? 0x7fc0u : (x + 0x7fffu + (x >> 16 & 1u)) >> 16);
    return *this;
  }
};

template <class T> using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---------------------------------------------------------------------------------------- loops
// PyTorch's C interface takes a function and a pointer, no lambda; 32,768: its own least number of operations per core.
template <class Body> void parallel(Where where, int64_t count, int64_t cost, Body body) {       // body(begin, end)
  if (count == 0) return;
  auto part = [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); };
  where.parallel(count, 1 + 32768 / (1 + cost), part, &body);
}

// `omp simd` has the compiler vectorise a loop. Bodies capture by value where they can: what is read through a
// reference could change with every write.
template <int N, class Body> inline void lanes(Body body) {
#pragma omp simd
  for (int l = 0; l < N; ++l) body(l);
}

// The compiler may not change the order of a sum of floats. So WIDE sums run side by side, of floats two vectors of
// AVX-512: the next addition need not wait for the last. Folded, they leave NARROW ones, and these a single one.
constexpr int WIDE = 32, NARROW = 16;

template <class Body> inline void each(int64_t count, Body body) {
  int64_t k = 0;
  for (; k + WIDE <= count; k += WIDE) lanes<WIDE>([=](int l) { body(k + l); });
  for (; k + NARROW <= count; k += NARROW) lanes<NARROW>([=](int l) { body(k + l); });
  for (; k < count; ++k) body(k);
}

template <class R> inline R total(R (&a)[NARROW]) {
  lanes<8>([&](int l) { a[l] += a[l + 8]; });
  lanes<4>([&](int l) { a[l] += a[l + 4]; });
  return (a[0] + a[2]) + (a[1] + a[3]);
}

struct Sums { double first = 0, second = 0; };

// Two sums at once: term(k, a, b) adds to both. Within a chunk in R, from chunk to chunk in double.
template <class R, class Term> inline Sums sum(int64_t count, Term term) {
  constexpr int64_t chunk = 4096;
  Sums sums;
  for (int64_t begin = 0; begin < count; begin += chunk) {
    const int64_t end = std::min(begin + chunk, count);
    int64_t k = begin;
    R a[NARROW] = {}, b[NARROW] = {};
    if (k + WIDE <= end) {
      R wide_a[WIDE] = {}, wide_b[WIDE] = {};
      for (; k + WIDE <= end; k += WIDE) lanes<WIDE>([&, k](int l) { term(k + l, wide_a[l], wide_b[l]); });
      lanes<NARROW>([&](int l) {
        a[l] = wide_a[l] + wide_a[l + NARROW];
        b[l] = wide_b[l] + wide_b[l + NARROW];
      });
    }
    for (; k + NARROW <= end; k += NARROW) lanes<NARROW>([&, k](int l) { term(k + l, a[l], b[l]); });
    for (int l = 0; k < end; ++k, ++l) term(k, a[l], b[l]);
    sums.first += total(a);
    sums.second += total(b);
  }
  return sums;
}

template <class R> inline R leaky_relu(R value, R slope) { return value > 0 ? value : value * slope; }

// --------------------------------------------------------------------------------------- stores
// A tensor of 32 MB or more does not fit into most caches. It is written past them (but for AdaIN's in 16 bits or of 16,
// 64 or 256 pixels), since they would read each line of memory before they change it. Only AVX-512 writes a line by one
// instruction. part: bytes of an image, or of a piece of a row.
#ifdef __AVX512F__
inline bool past_caches(const void* to, int64_t bytes, int64_t part) {
  return bytes >= 1 << 25 && part % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}
inline void store_past_caches(void* to, const void* from, int64_t bytes) {
  for (int64_t k = 0; k < bytes / 64; ++k)
    _mm512_stream_si512(static_cast<__m512i*>(to) + k, static_cast<const __m512i*>(from)[k]);
}
inline void wait_for_stores() { _mm_sfence(); }                             // before other threads read
#else
inline bool past_caches(const void*, int64_t, int64_t) { return false; }
inline void store_past_caches(void*, const void*, int64_t) {}
inline void wait_for_stores() {}
#endif

// Calls body(begin, count, piece) until all `count` numbers of `to` are written; body writes to piece. Inlined: where
// `count` and `large` are constants nothing else is left.
template <class T, class Count, class Large, class Body>
inline __attribute__((always_inline)) void written(Count count, T* to, Large large, Body body) {
  if (!large) return body(0, count, to);
  alignas(64) T piece[256];
  for (int64_t begin = 0; begin < count; begin += 256) {
    const int64_t length = std::min<int64_t>(256, count - begin);
    body(begin, length, piece);
    store_past_caches(to + begin, piece, length * sizeof(T));
  }
}

// ----------------------------------------------------------------------------- gradient penalty
// The part of a row that piece number i of all the rows is.
struct Piece {
  int64_t row, begin, count;
  Piece(const Penalty& p, int64_t i) {
    const int64_t n = pieces(p.rows, p.columns), length = ((p.columns + n - 1) / n + 63) / 64 * 64;     // whole lines
    row = i / n;
    begin = i % n * length;
    count = std::min(length, p.columns - begin);                            // below 1: nothing is left for it
    begin += row * p.columns;
  }
};

template <class T> void forward(const Penalty& p, Where where) {
  using R = Real<T>;
  const int64_t n = pieces(p.rows, p.columns);
  R *partial = static_cast<R*>(p.partial), *norms = static_cast<R*>(p.norms);
  parallel(where, p.rows * n, p.columns / n, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const Piece piece(p, i);
      const T *u = static_cast<const T*>(p.u) + piece.begin, *v = static_cast<const T*>(p.v) + piece.begin;
      partial[i] = R(sum<R>(piece.count, [u, v](int64_t k, R& s, R&) { s += R(u[k]) * R(v[k]); }).first);
    }
  });
  double total = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    double square = 0;
    for (int64_t j = 0; j < n; ++j) square += partial[row * n + j];
    norms[row] = R(std::sqrt(square < 0 ? 0 : square));                     // by rounding, where it should be 0
    total += (norms[row] - 1) * (norms[row] - 1);
  }
  *static_cast<R*>(p.penalty) = R(total / double(p.rows));                  // no rows: NaN, as the mean of nothing
}

template <class T> void backward(const Penalty& p, Where where) {
  using R = Real<T>;
  const int64_t n = pieces(p.rows, p.columns);
  const R *norms = static_cast<const R*>(p.norms), *d_norms = static_cast<const R*>(p.d_norms);
  const R d_penalty = *static_cast<const R*>(p.d_penalty);
  parallel(where, p.rows * n, p.columns / n, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const Piece piece(p, i);
      const R norm = norms[piece.row];
      const R d_norm = d_penalty * 2 * (norm - 1) / R(p.rows) + (d_norms ? d_norms[piece.row] : 0);
      const R factor = norm == 0 ? 0 : d_norm / norm;                       // at norm 0 the subgradient 0: torch.norm's
      const T* u = static_cast<const T*>(p.u) + piece.begin;
      T* d_v = static_cast<T*>(p.d_v) + piece.begin;
      const bool large = past_caches(d_v, p.rows * p.columns * sizeof(T), piece.count * sizeof(T));
      written(piece.count, d_v, large, [=](int64_t begin, int64_t count, T* to) {
        each(count, [=](int64_t k) { to[k] = factor * R(u[begin + k]); });
      });
    }
    wait_for_stores();
  });
}

// ---------------------------------------------------------------------------------------- AdaIN
// One instance. It stays in the cache between the loops, which compute it anew from x rather than keep it.
template <class R, bool NOISE> struct Instance {
  const R *x, *noise;
  R strength;

  Instance(const Adain& a, int64_t stride, int64_t i)
      : x(static_cast<const R*>(a.x) + i * stride),
        noise(NOISE ? static_cast<const R*>(a.noise) + i / a.channels * a.noise_stride : nullptr),
        strength(NOISE ? static_cast<const R*>(a.strength)[i % a.channels * a.strength_stride] : 0) {}

  R operator[](int64_t k) const { return NOISE ? x[k] + strength * noise[k] : x[k]; }
};

template <class R, bool NOISE, class Count, class Large>
inline void forward(const Adain& a, int64_t stride, int64_t i, Count pixels, Large large) {
  const Instance<R, NOISE> u(a, stride, i);
  // The mean of all pixels or of a beginning: about it the sums below lose few digits.
  const int64_t beginning = pixels <= 64 ? pixels : std::max<int64_t>(64, pixels / 16);
  const R centre = R(sum<R>(beginning, [u](int64_t k, R& s, R&) { s += u[k]; }).first) / R(beginning);
  const Sums d = sum<R>(pixels, [u, centre](int64_t k, R& s, R& t) {
    const R deviation = u[k] - centre;
    s += deviation;
    t += deviation * deviation;
  });
  const R shift = beginning == pixels ? 0 : R(d.first) / R(pixels), variance = R(d.second) / R(pixels) - shift * shift;
  const R mean = centre + shift, rstd = 1 / std::sqrt((variance < 0 ? 0 : variance) + R(a.eps));    // NaN stays NaN
  const R factor = static_cast<const R*>(a.scale)[i] * rstd, bias = static_cast<const R*>(a.bias)[i];
  const R slope = R(a.slope);
  written(pixels, static_cast<R*>(a.y) + i * stride, large, [=](int64_t begin, auto count, R* y) {
    each(count, [=](int64_t k) { y[k] = leaky_relu((u[begin + k] - mean) * factor + bias, slope); });
  });
  static_cast<R*>(a.mean)[i] = mean;
  static_cast<R*>(a.rstd)[i] = rstd;
}

template <class R, bool NOISE, class Count, class Large>
inline void backward(const Adain& a, int64_t stride, int64_t i, Count pixels, Large large) {
  const Instance<R, NOISE> u(a, stride, i);
  const R mean = static_cast<const R*>(a.mean)[i], rstd = static_cast<const R*>(a.rstd)[i];
  const R factor = static_cast<const R*>(a.scale)[i] * rstd, bias = static_cast<const R*>(a.bias)[i];
  const R slope = R(a.slope);
  const R* dy = static_cast<const R*>(a.dy) + i * stride;

  auto d_normal = [=](R deviation, int64_t k) {                             // of deviation * factor + bias
    return deviation * factor + bias > 0 ? dy[k] : dy[k] * slope;
  };
  const Sums d = sum<R>(pixels, [=](int64_t k, R& s, R& t) {
    const R deviation = u[k] - mean, g = d_normal(deviation, k);
    s += g;
    t += g * deviation;
  });
  const R mean_d = R(d.first) / R(pixels), slope_d = R(d.second) / R(pixels) * rstd * rstd;
  double d_strength = 0;
  written(pixels, static_cast<R*>(a.dx) + i * stride, large, [&](int64_t begin, auto count, R* dx) {
    d_strength += sum<R>(count, [=](int64_t k, R& s, R&) {
      const R deviation = u[begin + k] - mean;
      dx[k] = factor * (d_normal(deviation, begin + k) - mean_d - deviation * slope_d);
      if (NOISE) s += dx[k] * u.noise[begin + k];
    }).first;
  });
  static_cast<R*>(a.d_bias)[i] = R(d.first);
  static_cast<R*>(a.d_scale)[i] = R(d.second * rstd);
  if (NOISE) static_cast<R*>(a.d_strength)[i] = R(d_strength);
}

// The instances from `begin` to `end`, whose pixels lie `stride` apart.
template <class R, bool NOISE>
void instances(const Adain& a, int64_t stride, int64_t begin, int64_t end, bool backwards) {
  auto of = [&](auto pixels, auto large) {
    if (backwards)
      for (int64_t i = begin; i < end; ++i) backward<R, NOISE>(a, stride, i, pixels, large);
    else
      for (int64_t i = begin; i < end; ++i) forward<R, NOISE>(a, stride, i, pixels, large);
  };
  const void* result = backwards ? a.dx : a.y;
  const bool large = past_caches(result, a.instances * stride * sizeof(R), a.pixels * sizeof(R));
  if constexpr (std::is_same_v<R, float>) {                                 // with constants small loops are unrolled
    if (a.pixels == 16) return of(std::integral_constant<int64_t, 16>(), std::false_type());
    if (a.pixels == 64) return of(std::integral_constant<int64_t, 64>(), std::false_type());
    if (a.pixels == 256) return of(std::integral_constant<int64_t, 256>(), std::false_type());
  }
  of(a.pixels, large);
  if (large) wait_for_stores();
}

template <class R> void instances(const Adain& a, int64_t stride, int64_t begin, int64_t end, bool backwards) {
  (a.noise ? instances<R, true> : instances<R, false>)(a, stride, begin, end, backwards);
}

// 16-bit instances are computed in float32, each from copies and into one.
template <class T> void converted(const Adain& a, int64_t begin, int64_t end, bool backwards) {
  std::vector<float> x(a.pixels), noise(a.noise ? a.pixels : 0), dy(backwards ? a.pixels : 0), result(a.pixels);
  Adain one = a;
  one.x = x.data(), one.dy = dy.data(), one.y = one.dx = result.data();
  if (a.noise) one.noise = noise.data(), one.noise_stride = 0;
  auto copied = [&](const void* tensor, int64_t offset, float* to) {
    const T* from = static_cast<const T*>(tensor) + offset;
    each(a.pixels, [=](int64_t k) { to[k] = from[k]; });
  };
  for (int64_t i = begin; i < end; ++i) {
    copied(a.x, i * a.pixels, x.data());
    if (a.noise) copied(a.noise, i / a.channels * a.noise_stride, noise.data());
    if (backwards) copied(a.dy, i * a.pixels, dy.data());
    instances<float>(one, 0, i, i + 1, backwards);
    T* to = static_cast<T*>(backwards ? a.dx : a.y) + i * a.pixels;
    each(a.pixels, [to, from = result.data()](int64_t k) { to[k] = from[k]; });
  }
}

template <class F> int for_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: f(float()); break;
    case Dtype::float16: f(Half()); break;
    case Dtype::bfloat16: f(BFloat()); break;
    case Dtype::float64: f(double()); break;
  }
  return 0;
}

int adain(const Adain& a, bool backwards, Dtype dtype, Where where) {
  return for_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    parallel(where, a.instances, (1 + backwards) * a.pixels, [&](int64_t begin, int64_t end) {
      if constexpr (std::is_same_v<T, Real<T>>) instances<T>(a, a.pixels, begin, end, backwards);
      else converted<T>(a, begin, end, backwards);
    });
  });
}

}  // namespace

int penalty_forward(const Penalty& p, Dtype dtype, Where where) {
  return for_dtype(dtype, [&](auto kind) { forward<decltype(kind)>(p, where); });
}

int penalty_backward(const Penalty& p, Dtype dtype, Where where) {
  return for_dtype(dtype, [&](auto kind) { backward<decltype(kind)>(p, where); });
}

int adain_forward(const Adain& a, Dtype dtype, Where where) { return adain(a, false, dtype, where); }
int adain_backward(const Adain& a, Dtype dtype, Where where) { return adain(a, true, dtype, where); }
