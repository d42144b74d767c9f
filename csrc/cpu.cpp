// The kernels for the CPU. Loops over one instance vectorise; rows and instances spread over the cores.
//
// Every sum runs in an order that depends on the shape alone: results are the same bits on any number of threads.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

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
template <class Body> void parallel(Where where, int64_t count, int64_t cost, Body body) {
  if (count == 0) return;
  auto part = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<Body*>(context))(i);
  };
  where.parallel(count, 1 + 32768 / (1 + cost), part, &body);
}

// `omp simd` lets the compiler vectorise the loops below: by itself it may not change the order of a sum of floats.
// 16-bit numbers go 32 or 64 at a time, the rest of a loop then 16 at a time. Bodies and terms capture by value: what
// is read through a reference could change with every write, and nothing would vectorise.
template <class T> inline int64_t wide_part(int64_t count) { return sizeof(T) == 2 ? count / 64 * 64 : count; }

template <class T, class Body> inline void each(int64_t count, Body body) {
  const int64_t wide = wide_part<T>(count);
#pragma omp simd
  for (int64_t k = 0; k < wide; ++k) body(k);
#pragma omp simd simdlen(16)
  for (int64_t k = wide; k < count; ++k) body(k);
}

struct Sums { double first = 0, second = 0; };

// Two sums at once: term(k, a, b) adds to both. Within a chunk in R, from chunk to chunk in double.
template <class T, class Term> inline Sums sum(int64_t count, Term term) {
  constexpr int64_t chunk = 4096;
  Sums total;
  for (int64_t begin = 0; begin < count; begin += chunk) {
    const int64_t end = std::min(begin + chunk, count), wide = wide_part<T>(end);
    Real<T> a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t k = begin; k < wide; ++k) term(k, a, b);
#pragma omp simd simdlen(16) reduction(+ : a, b)
    for (int64_t k = wide; k < end; ++k) term(k, a, b);
    total.first += a;
    total.second += b;
  }
  return total;
}

template <class R> inline R leaky_relu(R value, R slope) { return value > 0 ? value : value * slope; }

// ----------------------------------------------------------------------------- gradient penalty
// The part of a row that piece number i of all the rows is.
struct Piece {
  int64_t row, begin, count;
  Piece(const Penalty& p, int64_t i) {
    const int64_t n = pieces(p.rows, p.columns), length = (p.columns + n - 1) / n;
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
  parallel(where, p.rows * n, p.columns / n, [&](int64_t i) {
    const Piece piece(p, i);
    const T* g = static_cast<const T*>(p.gradient) + piece.begin;
    partial[i] = R(sum<T>(piece.count, [g](int64_t k, R& s, R&) { const R v = g[k]; s += v * v; }).first);
  });
  double total = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    double square = 0;
    for (int64_t j = 0; j < n; ++j) square += partial[row * n + j];
    norms[row] = R(std::sqrt(square));
    total += (norms[row] - 1) * (norms[row] - 1);
  }
  *static_cast<R*>(p.penalty) = R(total / double(p.rows));                  // no rows: NaN, as the mean of nothing
}

template <class T> void backward(const Penalty& p, Where where) {
  using R = Real<T>;
  const int64_t n = pieces(p.rows, p.columns);
  const R *norms = static_cast<const R*>(p.norms), *d_norms = static_cast<const R*>(p.d_norms);
  const R d_penalty = *static_cast<const R*>(p.d_penalty);
  parallel(where, p.rows * n, p.columns / n, [&](int64_t i) {
    const Piece piece(p, i);
    const R norm = norms[piece.row];
    const R d_norm = d_penalty * 2 * (norm - 1) / R(p.rows) + (d_norms ? d_norms[piece.row] : 0);
    const R factor = norm == 0 ? 0 : d_norm / norm;                         // at norm 0 the subgradient 0: torch.norm's
    const T* g = static_cast<const T*>(p.gradient) + piece.begin;
    T* d_gradient = static_cast<T*>(p.d_gradient) + piece.begin;
    each<T>(piece.count, [=](int64_t k) { d_gradient[k] = factor * R(g[k]); });
  });
}

// ---------------------------------------------------------------------------------------- AdaIN
// One instance. It stays in the cache between the loops, which compute it anew from x rather than keep it.
template <class T, bool NOISE> struct Instance {
  using R = Real<T>;
  const T *x, *noise;
  R strength, slope_before;

  Instance(const Adain& a, int64_t i)
      : x(static_cast<const T*>(a.x) + i * a.pixels),
        noise(NOISE ? static_cast<const T*>(a.noise) + i / a.channels * a.noise_stride : nullptr),
        strength(NOISE ? static_cast<const R*>(a.strength)[i % a.channels * a.strength_stride] : 0),
        slope_before(R(a.slope_before)) {}

  R with_noise(int64_t k) const { return NOISE ? R(x[k]) + strength * R(noise[k]) : R(x[k]); }
  R operator[](int64_t k) const { return leaky_relu(with_noise(k), slope_before); }
};

template <class T, bool NOISE> void forward(const Adain& a, int64_t i) {
  using R = Real<T>;
  const Instance<T, NOISE> u(a, i);
  const int64_t pixels = a.pixels, beginning = std::min<int64_t>(pixels, 256);
  const R centre = R(sum<T>(beginning, [u](int64_t k, R& s, R&) { s += u[k]; }).first / beginning);
  const Sums d = sum<T>(pixels, [u, centre](int64_t k, R& s, R& t) {      // about it the sums lose few digits
    const R deviation = u[k] - centre;
    s += deviation;
    t += deviation * deviation;
  });
  const double shift = d.first / pixels, variance = std::max(d.second / pixels - shift * shift, 0.0);
  const R mean = R(centre + shift), rstd = R(1 / std::sqrt(variance + a.eps));
  const R factor = static_cast<const R*>(a.scale)[i] * rstd, bias = static_cast<const R*>(a.bias)[i];
  const R slope = R(a.slope_after);
  T* y = static_cast<T*>(a.y) + i * pixels;
  each<T>(pixels, [=](int64_t k) { y[k] = leaky_relu((u[k] - mean) * factor + bias, slope); });
  static_cast<R*>(a.mean)[i] = mean;
  static_cast<R*>(a.rstd)[i] = rstd;
}

template <class T, bool NOISE> void backward(const Adain& a, int64_t i) {
  using R = Real<T>;
  const Instance<T, NOISE> u(a, i);
  const int64_t pixels = a.pixels;
  const R mean = static_cast<const R*>(a.mean)[i], rstd = static_cast<const R*>(a.rstd)[i];
  const R factor = static_cast<const R*>(a.scale)[i] * rstd, bias = static_cast<const R*>(a.bias)[i];
  const R slope = R(a.slope_after), slope_before = R(a.slope_before);
  const T* dy = static_cast<const T*>(a.dy) + i * pixels;
  T* dx = static_cast<T*>(a.dx) + i * pixels;

  auto d_normal = [=](R deviation, int64_t k) {                             // of deviation * factor + bias
    return deviation * factor + bias > 0 ? R(dy[k]) : R(dy[k]) * slope;
  };
  const Sums d = sum<T>(pixels, [=](int64_t k, R& s, R& t) {
    const R deviation = u[k] - mean, g = d_normal(deviation, k);
    s += g;
    t += g * deviation;
  });
  const R mean_d = R(d.first / pixels), slope_d = R(d.second / pixels * rstd * rstd);
  const double d_strength = sum<T>(pixels, [=](int64_t k, R& s, R&) {
    const R value = u.with_noise(k), deviation = leaky_relu(value, slope_before) - mean;
    const R d_value = factor * (d_normal(deviation, k) - mean_d - deviation * slope_d) * (value > 0 ? 1 : slope_before);
    dx[k] = d_value;
    if (NOISE) s += d_value * R(u.noise[k]);
  }).first;
  static_cast<R*>(a.d_bias)[i] = R(d.first);
  static_cast<R*>(a.d_scale)[i] = R(d.second * rstd);
  if (NOISE) static_cast<R*>(a.d_strength)[i] = R(d_strength);
}

template <class T, bool NOISE> void each_instance(const Adain& a, bool backwards, Where where) {
  if (backwards) parallel(where, a.instances, 2 * a.pixels, [&](int64_t i) { backward<T, NOISE>(a, i); });
  else parallel(where, a.instances, a.pixels, [&](int64_t i) { forward<T, NOISE>(a, i); });
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
    a.noise ? each_instance<T, true>(a, backwards, where) : each_instance<T, false>(a, backwards, where);
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
