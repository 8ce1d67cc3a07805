// The arithmetic of one position: its rows of m passes, LANES classes at a time.
//
// rows.cpp includes this file once per instruction set, with LANES defined, inside a namespace and a target region.
// Every vector below is a GCC/Clang vector of LANES elements, whatever the width of the machine's registers.
//
// Three paths compute the same quantities; `forward` chooses the first that loses no digits, the statistics say which.
//
// NEAR (float32, one exp and m - 1 expm1 a class). With k the likeliest class of pass 1 and, for every pass a,
//     d_a = (z_a - z_1) - (z_a[k] - z_1[k])    as small as the disagreement itself: the difference comes first
//     x_a = expm1(d_a),  f_a = d_a - mean_b d_b,  E = expectation under p_1 = softmax(z_1)
// everything follows from sums under p_1, without a second visit and without cancellation:
//     growth X_a = E x_a;  log(p_a / p_1) = d_a - log1p(X_a);  p_a = p_1 (1 + v_a),  v_a = (x_a - X_a) / (1 + X_a)
//     divergence = sum_a (E[x_a f_a] - X_a E[f_a]) / (1 + X_a) / (m - 1)
//     mean F_a = expectation of f_a under p_a = E f_a + (E[x_a f_a] - X_a E[f_a]) / (1 + X_a)
//
// It comes DIRECT, d_a as it stands above; and COMPENSATED, with the rounding error of z_a - z_1 added back, for logits
// with an offset between passes that dwarfs their disagreement, and with care for classes at -inf.
//
// FAR (float64, m exp a class, several times slower). For logits far apart, or where class k is an outlier. Here
// t_a = z_a - max z_a and f_a = t_a - mean_b t_b; the divergence is sum_a E_{p_a}[f_a] / (m - 1).
//
// The cross-entropy is of a target t over the classes: w ((1 - eps) q + eps / V), where q is 1 at the label y or a row of
// probabilities. Its loss is sum t (log Z_a - z_a).
//
// Gradient of `grad_task * task + grad_divergence * divergence` in both: with A = grad_task / m and
// B = grad_divergence / (m - 1), for pass a,
//     A (p_a sum t - t) + B (p_a (f_a - F_a) + p_a - mean_b p_b)
// With one pass all this is the cross-entropy alone.
//
// That is the symmetric divergence. kDetached has its value, and of its gradient B (p_a - mean_b p_b). kFromFirst is the
// mean KL from pass 1 to each other pass, with r_a = log(p_a / p_1):
//     near: sum_a (E[x_a - d_a] - (X_a - log1p(X_a))) / (m - 1);  far: sum_a E[expm1(r_a) - r_a] / (m - 1)
//     its gradient for pass 1: B p_1 (f_1 - F_1) with f_1 = -sum_a d_a and F_1 = E f_1; for pass a: B (p_a - p_1)

typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES)));
typedef double Double __attribute__((vector_size(4 * LANES)));  // LANES / 2 elements: a register's width, like the rest
typedef int64_t Long __attribute__((vector_size(4 * LANES)));
typedef float HalfFloat __attribute__((vector_size(2 * LANES)));
typedef int32_t HalfInt __attribute__((vector_size(2 * LANES)));

INLINE Float broadcast(float value) { return value - Float{}; }
INLINE Double broadcast(double value) { return value - Double{}; }

struct Wide {
  Double half[2]{};

  INLINE void operator+=(Wide other) { half[0] += other.half[0], half[1] += other.half[1]; }
};

INLINE Wide widen(Float x) {
  HalfFloat halves[2];
  memcpy(halves, &x, sizeof x);
  return {{__builtin_convertvector(halves[0], Double), __builtin_convertvector(halves[1], Double)}};
}

INLINE Float narrow(Wide x) {
  const HalfFloat halves[2] = {__builtin_convertvector(x.half[0], HalfFloat),
                               __builtin_convertvector(x.half[1], HalfFloat)};
  Float narrowed;
  memcpy(&narrowed, halves, sizeof narrowed);
  return narrowed;
}

// The compilers know no single instruction for these; b where either is NaN.
#if X86 && LANES == 16
INLINE Float maximum(Float a, Float b) { return _mm512_max_ps(a, b); }
INLINE Float minimum(Float a, Float b) { return _mm512_min_ps(a, b); }
#elif X86 && LANES == 8
INLINE Float maximum(Float a, Float b) { return _mm256_max_ps(a, b); }
INLINE Float minimum(Float a, Float b) { return _mm256_min_ps(a, b); }
#elif X86
INLINE Float maximum(Float a, Float b) { return _mm_max_ps(a, b); }
INLINE Float minimum(Float a, Float b) { return _mm_min_ps(a, b); }
#else
INLINE Float maximum(Float a, Float b) { return a > b ? a : b; }
INLINE Float minimum(Float a, Float b) { return a < b ? a : b; }
#endif

// ---------------------------------------------------------------------------------------------- memory

// The classes are visited in groups of as many as fill a vector's bytes: LANES of float32; 2 * LANES of bfloat16, as two
// vectors, of its even and of its odd classes, because a 32-bit lane holds one of each and unpacks in one operation.
template <class T>
constexpr int kVectors = sizeof(float) / sizeof(T);
template <class T>
constexpr int kGroup = kVectors<T> * LANES;

// Which vector of a group; kPart where the group is the row's last and not full.
template <bool kIsPart, int kVector>
struct Slice {
  static constexpr bool kPart = kIsPart;
  static constexpr int kIndex = kVector;
};

template <int kIndex>
INLINE Float load(const float* group) {
  Float x;
  memcpy(&x, group, sizeof x);
  return x;
}

template <int kIndex>
INLINE Float load(const bfloat16* group) {
  Unsigned bits;
  memcpy(&bits, group, sizeof bits);
  return (Float)(kIndex == 0 ? bits << 16 : bits & 0xffff0000);
}

INLINE void store(float* group, const Float* x) { memcpy(group, x, sizeof *x); }

// The upper 16 bits of x to nearest. Ties, one in 65,536, go away from zero: to even would take three more operations, and
// these are what bfloat16 costs more than float32. Not for NaN.
INLINE Unsigned rounded_to_16_bits(Float x) { return (Unsigned)x + 0x8000; }

INLINE void store(bfloat16* group, const Float* x) {
  const Unsigned bits = (rounded_to_16_bits(x[0]) >> 16) | (rounded_to_16_bits(x[1]) & 0xffff0000);
  memcpy(group, &bits, sizeof bits);
}

// One vector of the group of classes from `start` on; classes beyond the last read as `fill`.
template <class S, class T>
INLINE Float classes_of(S, const T* row, int64_t start, int64_t classes, T fill) {
  if (!S::kPart) return load<S::kIndex>(row + start);
  T group[kGroup<T>];
  std::fill_n(group, kGroup<T>, fill);
  memcpy(group, row + start, (classes - start) * sizeof(T));
  return load<S::kIndex>(group);
}

// The same of numbers of the classes that are float32 whatever the logits; beyond the last, 0.
template <class T, class S>
INLINE Float numbers_of(S slice, const float* row, int64_t start, int64_t classes) {
  if (kVectors<T> == 1) return classes_of(slice, row, start, classes, 0.0f);
  float group[2 * LANES]{};
  memcpy(group, row + start, (S::kPart ? classes - start : 2 * LANES) * sizeof(float));
  Long pairs[2];  // of an even and an odd class, 32 bits each
  memcpy(pairs, group, sizeof pairs);
  HalfInt halves[2];
  for (int half = 0; half < 2; ++half) halves[half] = __builtin_convertvector(pairs[half] >> (32 * S::kIndex), HalfInt);
  Float x;
  memcpy(&x, halves, sizeof x);
  return x;
}

template <class S, class T, class Visit>
INLINE void visit_group(int64_t i, Visit& visit) {
  visit(Slice<S::kPart, 0>{}, i);
  if constexpr (kVectors<T> == 2) visit(Slice<S::kPart, 1>{}, i);
}

template <class T, class Visit>
INLINE void visit_classes(int64_t start, int64_t end, Visit visit) {
  int64_t i = start;
  for (; i + kGroup<T> <= end; i += kGroup<T>) visit_group<Slice<false, 0>, T>(i, visit);
  if (i < end) visit_group<Slice<true, 0>, T>(i, visit);
}

INLINE float largest(Float x) {
  float top = x[0];
  for (int i = 1; i < LANES; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

INLINE float smallest(Float x) { return -largest(-x); }

INLINE double sum(Wide x) {
  double total = 0;
  for (int i = 0; i < LANES; ++i) total += x.half[i / (LANES / 2)][i % (LANES / 2)];
  return total;
}

// ---------------------------------------------------------------------------------------------- exp and expm1

constexpr float kLog2E = 1.44269504f, kLn2 = 0x1.62e43p-1f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
constexpr float kToInteger = 0x1.8p23f;  // adding it rounds to an integer, in the low bits of the mantissa

// (expm1(r) - r) / r^2 of |r| <= log(2) / 2, as gives expm1 to a tenth of an ulp before rounding (minimax).
INLINE Float curvature_of_reduced(Float r) {
  Float q = broadcast(0x1.6bec06p-10f);
  q = q * r + 0x1.122776p-7f;
  q = q * r + 0x1.555674p-5f;
  q = q * r + 0x1.5554b0p-3f;
  return q * r + 0x1.fffffep-2f;
}

INLINE Float expm1_of_reduced(Float r) { return curvature_of_reduced(r) * (r * r) + r; }

INLINE Float reduced(Float x, Float* rounded) {
  *rounded = x * kLog2E + kToInteger;
  Float n = *rounded - kToInteger;
#ifdef FUSED  // n * kLn2 is not rounded, and kLn2 is log(2) to 2e-9
  return x - n * kLn2;
#else
  return (x - n * kLn2High) - n * kLn2Low;
#endif
}

// 2^64 exp(x) for x <= 43; the factor keeps exp(-131) a normal number. Smaller x, -inf included, count as -131.
INLINE Float exp_times_2_64(Float x) {
  x = maximum(broadcast(-131.0f), x);  // in this order a NaN stays
  Float rounded;
  Float y = expm1_of_reduced(reduced(x, &rounded)) + 1.0f;
  return (Float)((Int)y + (((Int)rounded + 64) << 23));
}

// For |x| <= 43.
INLINE Float expm1(Float x) {
  Float rounded;
  Float y = expm1_of_reduced(reduced(x, &rounded));
  Float power = (Float)(((Int)rounded + 127) << 23);
  return power * y + (power - 1.0f);
}

// expm1(x) - x for |x| <= 43, without cancellation.
INLINE Float beyond_tangent(Float x) {
  Float rounded;
  Float r = reduced(x, &rounded);
  return rounded == kToInteger ? curvature_of_reduced(r) * (r * r) : expm1(x) - x;
}

// exp(x) in float64 for x <= 0; smaller than -700, -inf included, 0.
INLINE Double exp(Double x) {
  constexpr double kTo = 0x1.8p52;
  Double in_range = x < -700.0 ? broadcast(-700.0) : x;
  Double rounded = in_range * 1.4426950408889634 + kTo;
  Double n = rounded - kTo;
  Double r = (in_range - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  Double y = broadcast(1.0 / 6227020800);  // Taylor: r^14 / 14! is 4e-18
  for (double inverse_factorial : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                   1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    y = y * r + inverse_factorial;
  y = (Double)((Long)y + ((Long)rounded << 52));
  return x < -700.0 ? Double{} : y;
}

// ---------------------------------------------------------------------------------------------- one position

// What t is at the classes, but for the label's own: 0, eps / V, or different at each.
enum Shares { kNone, kUniform, kPerClass };

// t = w (scale q + uniform), and `at_label` more at the label: of probabilities q scale is 1 - eps, of a label 0.
struct Target {
  const float* weight;         // of the classes, or null
  const float* probabilities;  // q, or null
  int64_t label;
  double scale, uniform, at_label, mass;  // the mass is sum t

  INLINE Shares shares() const { return probabilities || (weight && uniform) ? kPerClass : uniform ? kUniform : kNone; }

  INLINE double share(int64_t i) const {
    return (weight ? weight[i] : 1.0) * ((probabilities ? scale * probabilities[i] : 0.0) + uniform);
  }

  template <class T, class S>
  INLINE Float share(S slice, int64_t i, int64_t classes) const {
    Float share = broadcast(float(uniform));
    if (probabilities) share += float(scale) * numbers_of<T>(slice, probabilities, i, classes);
    if (weight) share *= numbers_of<T>(slice, weight, i, classes);
    return share;
  }
};

// The rows of one position, `passes` of them; M is their number where it is known at compile time, else 0.
template <int M, class T>
struct Position {
  static constexpr int kCapacity = M ? M : kMaxPasses;
  const T* row[kCapacity];
  int64_t classes;
  int runtime_passes;
  Target target;

  INLINE int passes() const { return M ? M : runtime_passes; }

  INLINE Position<0, T> of_any_number() const {
    Position<0, T> position{{}, classes, runtime_passes, target};
    for (int a = 0; a < passes(); ++a) position.row[a] = row[a];
    return position;
  }
};

enum Path { kDirect, kCompensated, kFar };

enum Divergence { kSymmetric, kDetached, kFromFirst };  // DIVERGENCES in operators.py

// z_a[k] - z_1[k] = high + low exactly.
struct Offset {
  float high, low;
};

INLINE Offset two_difference(float a, float b) {  // Knuth
  volatile float high = a - b, taken = high - a;
  volatile float left = a - (high - taken), right = b + taken;
  return {high, left - right};
}

// d_a = (z_a - z_1) - offset.
template <Path kPath>
INLINE Float difference(Float z, Float first, Offset offset) {
  const Float high = z - first;
  Float d = high - offset.high;
  if (kPath == kDirect) return d;
  const Float taken = high - z;
  const Float low = (z - (high - taken)) - (first + taken);
  d += low - offset.low;
  return z + first == -kInfinity ? Float{} : d;
}

// ---------------------------------------------------------------------------------------------- forward

template <int M, class T>
struct Range {
  static constexpr int kCapacity = M ? M : kMaxPasses;
  Path path;              // the first to try
  float base[kCapacity];  // z_a[k], where k is the likeliest class of pass 1
  T top;                  // base[0], as it is stored
};

template <int M, class T>
INLINE Range<M, T> range_of(const Position<M, T>& position) {
  constexpr int64_t kChunk = 64 * kGroup<T>;
  const int m = position.passes();
  const int64_t classes = position.classes;
  const T* first = position.row[0];
  Float lowest = broadcast(kInfinity), rise[Position<M, T>::kCapacity], fall[Position<M, T>::kCapacity];
  for (int a = 1; a < m; ++a) rise[a] = broadcast(-kInfinity), fall[a] = broadcast(kInfinity);
  float top = -kInfinity;
  int64_t top_chunk = 0;
  for (int64_t start = 0; start < classes; start += kChunk) {
    const int64_t end = start + kChunk < classes ? start + kChunk : classes;
    Float best = broadcast(-kInfinity);
    visit_classes<T>(start, end, [&](auto slice, int64_t i) INLINE_LAMBDA {
      const Float z = classes_of(slice, first, i, classes, kMinusInfinity<T>);
      best = maximum(z, best);
      lowest = minimum(slice.kPart ? classes_of(slice, first, i, classes, kZero<T>) : z, lowest);
      for (int a = 1; a < m; ++a) {
        const Float d = classes_of(slice, position.row[a], i, classes, kMinusInfinity<T>) - z;
        rise[a] = maximum(d, rise[a]);  // NaN, which is -inf - -inf, does not count
        fall[a] = minimum(d, fall[a]);
      }
    });
    const float chunk_top = largest(best);
    if (chunk_top > top) top = chunk_top, top_chunk = start;
  }
  int64_t anchor = top_chunk;
  while (anchor + 1 < classes && to_float(first[anchor]) != top) ++anchor;
  Range<M, T> range;
  range.top = first[anchor];
  bool near = top > -kInfinity && top < kInfinity, direct = smallest(lowest) > -kInfinity;
  for (int a = 0; a < m; ++a) {
    range.base[a] = to_float(position.row[a][anchor]);
    if (a == 0) continue;
    const float offset = range.base[a] - range.base[0], highest = largest(rise[a]), deepest = smallest(fall[a]);
    near &= highest - offset <= 40 && offset - deepest <= 40;
    direct &= std::abs(offset) <= highest - deepest;
  }
  range.path = !near ? kFar : direct ? kDirect : kCompensated;
  return range;
}

// What a position's forward leaves for its backward: per pass, see the head of this file.
//   base   near: z_a[anchor]; far: max z_a
//   scale  p_a = scale * 2^64 exp(z_a - base)
//   mean   F_a
//   growth X_a (near)
// and how it was computed.
struct Pass {
  double base, scale, mean, growth;
};

struct Statistics {
  double path;
  Pass pass[];
};

struct Values {
  double task, divergence;
};

// Mean over the passes of the cross-entropy, from the log-normalizers and sum_classes t (z_a - base_a) but for the
// label's own, where t is uniform without it.
template <int M, class T>
INLINE double task_loss(const Position<M, T>& position, const Statistics& s, const double* below_base) {
  const Target& target = position.target;
  const int m = position.passes();
  double total = 0;
  for (int a = 0; a < m; ++a) {
    const double log_normalizer = -std::log(s.pass[a].scale * kTwo64);  // less base_a
    total += target.mass * log_normalizer;
    if (target.shares() != kNone) total -= (target.shares() == kUniform ? target.uniform : 1) * below_base[a];
    if (!target.probabilities)
      total -= target.at_label * (to_float(position.row[a][target.label]) - s.pass[a].base);
  }
  return total / m;
}

// Classes summed in float32, 32 terms a lane, before float64 takes over.
constexpr int64_t kBlock = 32 * LANES;

// False where this path would lose digits.
template <Divergence kDivergence, Path kPath, Shares kShares, int M, class T>
bool near_forward(const Position<M, T>& position, const Range<M, T>& range, Statistics& s, Values& values) {
  constexpr int kCapacity = Position<M, T>::kCapacity;
  const int m = position.passes();
  const int64_t classes = position.classes;
  Offset offset[kCapacity];
  for (int a = 1; a < m; ++a) offset[a] = two_difference(range.base[a], range.base[0]);
  Wide p_total, d_total[kCapacity], x_total[kCapacity], second_total[kCapacity], below_base_total[kCapacity];
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t end = start + kBlock < classes ? start + kBlock : classes;
    Float p_sum{}, d_sum[kCapacity], x_sum[kCapacity], second_sum[kCapacity], below_base[kCapacity];
    for (int a = 0; a < m; ++a) d_sum[a] = x_sum[a] = second_sum[a] = below_base[a] = Float{};
    visit_classes<T>(start, end, [&](auto slice, int64_t i) INLINE_LAMBDA {
      constexpr bool kPart = decltype(slice)::kPart;
      const Float first = classes_of(slice, position.row[0], i, classes, kMinusInfinity<T>);
      const Float below = first - range.base[0];
      const Float p = exp_times_2_64(below);
      p_sum += p;
      Float share{};
      if (kShares == kPerClass) share = position.target.template share<T>(slice, i, classes);
      if (kShares != kNone) {  // classes beyond the last add 0 to this sum
        Float term = kPart ? classes_of(slice, position.row[0], i, classes, range.top) - range.base[0] : below;
        if (kShares == kPerClass && kPath != kDirect) term = share == 0 ? Float{} : term;  // it may be -inf
        below_base[0] += kShares == kPerClass ? share * term : term;
      }
      Float d[kCapacity], d_mean{};
      for (int a = 1; a < m; ++a) {
        const Float z = classes_of(slice, position.row[a], i, classes, kMinusInfinity<T>);
        d[a] = difference<kPart ? kCompensated : kPath>(z, first, offset[a]);
        d_mean += d[a];
      }
      d_mean = d_mean * (1.0f / m);
      for (int a = 1; a < m; ++a) {
        const Float px = p * expm1(d[a]);
        d_sum[a] += p * d[a];
        x_sum[a] += px;
        if (kDivergence == kFromFirst)
          second_sum[a] += p * beyond_tangent(d[a]);
        else
          second_sum[a] += px * (M == 2 ? d[a] : d[a] - d_mean);  // of two passes f is d / 2
        if (kShares != kNone) below_base[a] += kShares == kPerClass ? share * d[a] : d[a];
      }
    });
    p_total += widen(p_sum);
    for (int a = 0; a < m; ++a) {
      if (kShares != kNone) below_base_total[a] += widen(below_base[a]);
      if (a == 0) continue;
      d_total[a] += widen(d_sum[a]);
      x_total[a] += widen(x_sum[a]);
      second_total[a] += widen(second_sum[a]);
    }
  }

  const double normalizer = sum(p_total);
  double d[kCapacity], d_mean = 0, below_base[kCapacity], largest_offset = 0;
  for (int a = 1; a < m; ++a) d_mean += d[a] = sum(d_total[a]) / normalizer;
  d_mean /= m;
  s.path = kPath;
  s.pass[0] = {range.base[0], 1 / normalizer, kDivergence == kFromFirst ? -d_mean * m : -d_mean, 0};
  below_base[0] = sum(below_base_total[0]);
  double total = 0, uncentered = 0;
  for (int a = 1; a < m; ++a) {
    const double growth = sum(x_total[a]) / normalizer, second = sum(second_total[a]) / normalizer;
    if (growth < -0.875) return false;  // x_a near -1 in most of p_1: 1 + growth has lost its digits
    double mean = 0;
    if (kDivergence == kFromFirst) {
      // The same twice: from terms of second order, or, where those are large, as log(1 + X) - E d. E |d| is at most
      // 2 log(2 + X) - E d, by Jensen, for x > -1.
      const double log_growth = std::log1p(growth);
      const double apart = std::abs(log_growth) + 2 * std::log(2 + growth) + std::abs(d[a]);
      total += second < apart ? second - (growth - log_growth) : log_growth - d[a];
      uncentered += second < apart ? second : apart;
    } else {
      const double f = d[a] - d_mean, xf = second * (M == 2 ? 0.5 : 1.0);
      const double covariance = (xf - growth * f) / (1 + growth);
      total += covariance;
      uncentered += std::abs(xf) / (1 + growth);
      mean = f + covariance;
    }
    s.pass[a] = {range.base[a], 1 / (normalizer * (1 + growth)), mean, growth};
    below_base[a] = below_base[0] + sum(below_base_total[a]);
    if (std::abs(offset[a].high) > largest_offset) largest_offset = std::abs(offset[a].high);
  }
  // Class k is an outlier, where the difference has lost its digits, or x_a f_a has overflowed.
  if (!(total >= uncentered * (kDivergence == kFromFirst ? 1 / 8.0 : 1 / 16.0) && uncentered < kInfinity)) return false;
  // Each d has an error of 2^-25 offset; against the sum of p d^2, about 2 total, it is in the seventh digit.
  const double beside_anchor = 1 - kTwo64 / normalizer;
  if (kPath == kDirect && sizeof(T) == 4 && largest_offset * largest_offset * beside_anchor > 32 * total / (m - 1))
    return false;
  values.divergence = total < 0 || m == 1 ? 0 : total / (m - 1);
  values.task = task_loss(position, s, below_base);
  return true;
}

template <Divergence kDivergence, Path kPath, int M, class T>
INLINE bool try_near(const Position<M, T>& position, const Range<M, T>& range, Statistics& s, Values& values) {
  switch (position.target.shares()) {
    case kNone: return near_forward<kDivergence, kPath, kNone>(position, range, s, values);
    case kUniform: return near_forward<kDivergence, kPath, kUniform>(position, range, s, values);
    default: return near_forward<kDivergence, kPath, kPerClass>(position, range, s, values);
  }
}

// In float64, LANES / 2 classes: f_a = t_a - mean_b t_b with t_a = z_a - base_a, and p_a unnormalized. For kFromFirst
// f_a = t_a - t_1, and f_1 less their sum.
template <class S, class T>
INLINE void far_terms(S slice, const Position<0, T>& position, const Statistics& s, int64_t i, int half,
                      Divergence divergence, Double* f, Double* p) {
  const int m = position.passes();
  Long outside = Long{} - 1;
  Double mean{};
  for (int a = 0; a < m; ++a) {
    const Double z = widen(classes_of(slice, position.row[a], i, position.classes, kMinusInfinity<T>)).half[half];
    outside &= z == -double(kInfinity);
    f[a] = z - s.pass[a].base;
    p[a] = exp(f[a]);
    mean += f[a];
  }
  mean = mean / double(m);
  const Double middle = divergence == kFromFirst ? f[0] : mean;
  for (int a = 0; a < m; ++a) f[a] = outside ? Double{} : f[a] - middle;
  for (int a = 1; divergence == kFromFirst && a < m; ++a) f[0] -= f[a];
}

// sum_a E[expm1(r_a) - r_a] under p_1, once the statistics are known.
template <class T>
double far_kl_from_first(const Position<0, T>& position, const Statistics& s) {
  const int m = position.passes();
  Wide total;
  visit_classes<T>(0, position.classes, [&](auto slice, int64_t i) INLINE_LAMBDA {
    for (int half = 0; half < 2; ++half) {
      Double f[kMaxPasses], p[kMaxPasses];
      far_terms(slice, position, s, i, half, kFromFirst, f, p);
      for (int a = 0; a < m; ++a) p[a] = p[a] * (s.pass[a].scale * kTwo64);
      for (int a = 1; a < m; ++a) {
        const Double r = f[a] + std::log(s.pass[a].scale / s.pass[0].scale);
        Double series = broadcast(1.0);  // Taylor: for |r| < 0.05 the next term is 1e-15 of the first
        for (int n = 10; n > 2; --n) series = series * r / double(n) + 1.0;
        const Double near = p[0] * (r * r) * (0.5 * series), far = p[a] - p[0] - p[0] * r;
        total.half[half] += (r < 0.05) & (r > -0.05) ? near : far;
      }
    }
  });
  return sum(total);
}

template <class T>
void far_forward(const Position<0, T>& position, Divergence divergence, Statistics& s, Values& values) {
  const int m = position.passes();
  const int64_t classes = position.classes;
  const Target& target = position.target;
  double below_base[kMaxPasses]{};
  for (int a = 0; a < m; ++a) {
    float top = -kInfinity;
    for (int64_t i = 0; i < classes; ++i) top = to_float(position.row[a][i]) > top ? to_float(position.row[a][i]) : top;
    s.pass[a] = {top, 0, 0, 0};
    for (int64_t i = 0; target.shares() != kNone && i < classes; ++i) {
      const double share = target.shares() == kUniform ? 1 : target.share(i);
      if (share != 0) below_base[a] += share * (to_float(position.row[a][i]) - double(top));
    }
  }
  Wide p_sum[kMaxPasses], pf_sum[kMaxPasses];
  visit_classes<T>(0, classes, [&](auto slice, int64_t i) INLINE_LAMBDA {
    for (int half = 0; half < 2; ++half) {
      Double f[kMaxPasses], p[kMaxPasses];
      far_terms(slice, position, s, i, half, divergence, f, p);
      for (int a = 0; a < m; ++a) {
        p_sum[a].half[half] += p[a];
        pf_sum[a].half[half] += p[a] * f[a];
      }
    }
  });
  double total = 0;
  for (int a = 0; a < m; ++a) {
    const double normalizer = sum(p_sum[a]);
    s.pass[a].scale = 1 / (kTwo64 * normalizer);
    s.pass[a].mean = sum(pf_sum[a]) / normalizer;
    total += s.pass[a].mean;
  }
  if (divergence == kFromFirst) total = far_kl_from_first(position, s);
  s.path = kFar;
  values.divergence = total < 0 || m == 1 ? 0 : total / (m - 1);
  values.task = task_loss(position, s, below_base);
}

template <Divergence kDivergence, int M, class T>
INLINE Values forward(const Position<M, T>& position, Statistics& s) {
  Values values;
  const Range<M, T> range = range_of(position);
  if constexpr (M == 2) {  // the common case alone pays for code of its own
    if (range.path == kDirect && try_near<kDivergence, kDirect>(position, range, s, values)) return values;
  }
  if (range.path != kFar && try_near<kDivergence, kCompensated>(position, range, s, values)) return values;
  far_forward(position.of_any_number(), kDivergence, s, values);
  return values;
}

// ---------------------------------------------------------------------------------------------- backward

// The coefficients of one position's gradient; see the head of this file.
struct Coefficients {
  double task;        // A
  double softmax;     // A sum t
  double divergence;  // B
};

// Each of these gives the gradient of one vector of classes in every pass, but for the target's own.

// Of the cross-entropy alone.
template <int M, class T>
struct PlainGradient {
  float base[Position<M, T>::kCapacity], scale[Position<M, T>::kCapacity], softmax;

  INLINE PlainGradient(const Position<M, T>& position, const Statistics& s, const Coefficients& c) : softmax(c.softmax) {
    for (int a = 0; a < position.passes(); ++a) base[a] = s.pass[a].base, scale[a] = s.pass[a].scale;
  }

  template <class S>
  INLINE void operator()(S slice, const Position<M, T>& position, int64_t i, Float* gradient) const {
    for (int a = 0; a < position.passes(); ++a) {
      const Float z = classes_of(slice, position.row[a], i, position.classes, kMinusInfinity<T>);
      gradient[a] = exp_times_2_64(z - base[a]) * scale[a] * softmax;
    }
  }
};

template <Divergence kDivergence, Path kPath, int M, class T>
struct NearGradient {
  static constexpr int kCapacity = Position<M, T>::kCapacity;
  Offset offset[kCapacity];
  float base, scale, divergence, level[kCapacity], shrink[kCapacity], growth[kCapacity];

  INLINE NearGradient(const Position<M, T>& position, const Statistics& s, const Coefficients& c)
      : base(s.pass[0].base), scale(s.pass[0].scale), divergence(c.divergence) {
    for (int a = 0; a < position.passes(); ++a) {
      offset[a] = two_difference(s.pass[a].base, s.pass[0].base);
      level[a] = c.softmax - (kDivergence == kDetached ? 0 : c.divergence * s.pass[a].mean);
      shrink[a] = 1 / (1 + s.pass[a].growth);
      growth[a] = s.pass[a].growth;
    }
  }

  template <class S>
  INLINE void operator()(S slice, const Position<M, T>& position, int64_t i, Float* gradient) const {
    const int m = position.passes();
    const Float first = classes_of(slice, position.row[0], i, position.classes, kMinusInfinity<T>);
    const Float p = exp_times_2_64(first - base) * scale;
    Float d[kCapacity], v[kCapacity];
    for (int a = 1; a < m; ++a) {
      const Float z = classes_of(slice, position.row[a], i, position.classes, kMinusInfinity<T>);
      d[a] = difference<S::kPart ? kCompensated : kPath>(z, first, offset[a]);
      v[a] = (expm1(d[a]) - growth[a]) * shrink[a];
    }
    Float d_mean = d[1], v_mean = v[1];  // the sums, at first
    for (int a = 2; a < m; ++a) d_mean += d[a], v_mean += v[a];
    if (kDivergence == kFromFirst) {
      gradient[0] = p * (level[0] - divergence * d_mean);
      for (int a = 1; a < m; ++a) gradient[a] = p * (level[a] + v[a] * (level[a] + divergence));
      return;
    }
    const float share = divergence * (1.0f / m);
    if (kDivergence == kDetached) {
      gradient[0] = p * (level[0] - share * v_mean);
      for (int a = 1; a < m; ++a)
        gradient[a] = p * (level[a] + (v[a] * level[a] + (divergence * v[a] - share * v_mean)));
      return;
    }
    gradient[0] = p * (level[0] - share * (d_mean + v_mean));
    if (M == 2) {  // d_1 - d_mean = d_1 / 2 = d_mean
      const Float pull = level[1] + share * d[1];
      gradient[1] = p * (pull + v[1] * (pull + share));
      return;
    }
    d_mean = d_mean * (1.0f / m);
    v_mean = v_mean * (1.0f / m);
    for (int a = 1; a < m; ++a) {
      const Float pull = level[a] + divergence * (d[a] - d_mean);
      gradient[a] = p * (pull + (v[a] * pull + divergence * (v[a] - v_mean)));
    }
  }
};

template <Divergence kDivergence, class T>
struct FarGradient {
  const Statistics& s;
  const Coefficients& c;

  INLINE FarGradient(const Position<0, T>&, const Statistics& s, const Coefficients& c) : s(s), c(c) {}

  template <class S>
  INLINE void operator()(S slice, const Position<0, T>& position, int64_t i, Float* gradient) const {
    const int m = position.passes();
    Wide wide[kMaxPasses];
    for (int half = 0; half < 2; ++half) {
      Double f[kMaxPasses], p[kMaxPasses], p_mean{};
      far_terms(slice, position, s, i, half, kDivergence, f, p);
      for (int a = 0; a < m; ++a) p_mean += p[a] = p[a] * (s.pass[a].scale * kTwo64);
      p_mean = kDivergence == kFromFirst ? p[0] : p_mean / double(m);
      for (int a = 0; a < m; ++a) {
        Double kl = p[a] - p_mean;
        if (kDivergence == kSymmetric || (kDivergence == kFromFirst && a == 0)) kl += p[a] * (f[a] - s.pass[a].mean);
        wide[a].half[half] = p[a] * c.softmax + c.divergence * kl;
      }
    }
    for (int a = 0; a < m; ++a) gradient[a] = narrow(wide[a]);
  }
};

// `out` may be the rows themselves: a group of classes is read before it is written, the label's group first of all.
template <class Gradient, int M, class T>
void write_gradient(const Position<M, T>& position, const Statistics& s, const Coefficients& c, T* const* out) {
  constexpr int kCapacity = Position<M, T>::kCapacity;
  const Gradient gradient_of(position, s, c);
  const int m = position.passes();
  const int64_t classes = position.classes, whole = classes - classes % kGroup<T>;
  const Target& target = position.target;
  const bool per_class = target.shares() == kPerClass;
  const float task = c.task, uniform = c.task * target.uniform;
  Float gradient[kCapacity][kVectors<T>];
  auto visit = [&](auto slice, int64_t i) INLINE_LAMBDA {
    Float of_pass[kCapacity], share = broadcast(uniform);
    if (per_class) share = task * target.share<T>(slice, i, classes);
    gradient_of(slice, position, i, of_pass);
    for (int a = 0; a < m; ++a) gradient[a][slice.kIndex] = of_pass[a] - share;
  };
  T at_label[kCapacity];
  const int64_t label_group = target.label - target.label % kGroup<T>;
  if (label_group < whole)
    visit_group<Slice<false, 0>, T>(label_group, visit);
  else
    visit_group<Slice<true, 0>, T>(label_group, visit);
  for (int a = 0; a < m; ++a) {  // in float32: one rounding, not two
    for (Float& vector : gradient[a]) vector -= float(c.task * target.at_label);
    T group[kGroup<T>];
    store(group, gradient[a]);
    at_label[a] = group[target.label - label_group];
  }
  for (int64_t i = 0; i < whole; i += kGroup<T>) {
    visit_group<Slice<false, 0>, T>(i, visit);
    for (int a = 0; a < m; ++a) store(out[a] + i, gradient[a]);
  }
  if (whole < classes) {
    visit_group<Slice<true, 0>, T>(whole, visit);
    for (int a = 0; a < m; ++a) {
      T group[kGroup<T>];
      store(group, gradient[a]);
      memcpy(out[a] + whole, group, (classes - whole) * sizeof(T));
    }
  }
  for (int a = 0; a < m; ++a) out[a][target.label] = at_label[a];
}

template <Divergence kDivergence, int M, class T>
INLINE void backward(const Position<M, T>& position, const Statistics& s, const Coefficients& c, T* const* out) {
  double check = c.softmax + c.divergence;
  for (int a = 0; a < position.passes(); ++a) check += s.pass[a].scale + s.pass[a].mean;
  if (!std::isfinite(check)) {
    for (int a = 0; a < position.passes(); ++a) std::fill_n(out[a], position.classes, kNotANumber<T>);
  } else if (M == 1 || c.divergence == 0) {
    write_gradient<PlainGradient<M, T>>(position, s, c, out);
  } else if constexpr (M != 1) {
    if (M == 2 && s.path == kDirect)
      write_gradient<NearGradient<kDivergence, M == 2 ? kDirect : kCompensated, M, T>>(position, s, c, out);
    else if (s.path == kCompensated)
      write_gradient<NearGradient<kDivergence, kCompensated, M, T>>(position, s, c, out);
    else
      write_gradient<FarGradient<kDivergence, T>>(position.of_any_number(), s, c, out);
  }
}

// ---------------------------------------------------------------------------------------------- one position of a call

// The target of position n; with probabilities that are none its mass is NaN, and so is the loss.
Target target_of(const RdropRows& rows, int64_t n, double total_weight) {
  const double kept = 1 - rows.label_smoothing, uniform = rows.label_smoothing / rows.classes;
  if (!rows.probabilities) {
    const int64_t label = rows.labels[n];
    const bool inside = label >= 0 && label < rows.classes;
    const double at_label = kept * (inside && rows.weight ? rows.weight[label] : 1.0);
    return {rows.weight, nullptr, label, 0, uniform, at_label, at_label + uniform * total_weight};
  }
  const float* probabilities = rows.probabilities + n * rows.classes;
  Float lowest{}, highest{};
  Wide total, weighted_total;
  for (int64_t start = 0; start < rows.classes; start += kBlock) {
    const int64_t end = start + kBlock < rows.classes ? start + kBlock : rows.classes;
    Float of_block{}, weighted{};
    visit_classes<float>(start, end, [&](auto slice, int64_t i) INLINE_LAMBDA {
      const Float q = numbers_of<float>(slice, probabilities, i, rows.classes);
      lowest = minimum(q, lowest);
      highest = maximum(q, highest);
      of_block += q;
      if (rows.weight) weighted += q * numbers_of<float>(slice, rows.weight, i, rows.classes);
    });
    total += widen(of_block);
    weighted_total += widen(rows.weight ? weighted : of_block);
  }
  const bool sound = smallest(lowest) >= 0 && largest(highest) <= 1 && std::abs(sum(total) - 1) <= kSumTolerance;
  const double mass = sound ? kept * sum(weighted_total) + uniform * total_weight : kNaN;
  return {rows.weight, probabilities, 0, kept, uniform, 0, mass};
}

template <Divergence kDivergence, int M, class T>
void compute_position(const RdropRows& rows, int64_t n, double total_weight) {
  constexpr int kCapacity = Position<M, T>::kCapacity;
  const int m = M ? M : rows.passes;
  const int64_t examples = rows.positions / rows.inner, example = n / rows.inner, place = n % rows.inner;
  Position<M, T> position;
  position.classes = rows.classes;
  position.runtime_passes = m;
  position.target = target_of(rows, n, total_weight);
  T* out[kCapacity];
  for (int a = 0; a < m; ++a) {
    const int64_t outer = a * examples + example;
    position.row[a] = (const T*)rows.logits + outer * rows.logits_outer_stride + place * rows.logits_inner_stride;
    out[a] = (T*)rows.gradient + outer * rows.gradient_outer_stride + place * rows.gradient_inner_stride;
  }
  Statistics& s = *(Statistics*)(rows.statistics + n * (1 + 4 * m));
  const int64_t label = position.target.label;
  const bool ignored = label == kIgnored;
  if (ignored || label < 0 || label >= rows.classes) {
    if (rows.forward) {
      memset((void*)&s, 0, (1 + 4 * m) * sizeof(double));
      rows.task[n] = ignored ? 0 : kNaN;
      rows.divergence[n] = 0;
    }
    for (int a = 0; rows.backward && a < m; ++a) {
      std::fill_n(out[a], rows.classes, ignored ? kZero<T> : kNotANumber<T>);
    }
    return;
  }
  if (rows.forward) {
    const Values values = forward<kDivergence == kDetached ? kSymmetric : kDivergence>(position, s);
    rows.task[n] = values.task;
    rows.divergence[n] = values.divergence;
    if (!std::isfinite(values.task + values.divergence) && rows.logits == rows.gradient) return;
  }
  if (rows.backward) {
    const double a = rows.grad_task[n] / m, b = m > 1 ? rows.grad_divergence[n] / (m - 1) : 0;
    backward<kDivergence>(position, s, {a, a * position.target.mass, b}, out);
  }
}

template <class T>
void compute_typed(const RdropRows& rows, int64_t n, double total_weight) {
  if (rows.passes == 1) return compute_position<kSymmetric, 1, T>(rows, n, total_weight);
  switch (rows.divergence_kind) {
    case kDetached: return compute_position<kDetached, 0, T>(rows, n, total_weight);
    case kFromFirst: return compute_position<kFromFirst, 0, T>(rows, n, total_weight);
  }
  if (rows.passes == 2) return compute_position<kSymmetric, 2, T>(rows, n, total_weight);
  compute_position<kSymmetric, 0, T>(rows, n, total_weight);
}

void compute(const RdropRows& rows, int64_t n, double total_weight) {
  rows.bfloat16 ? compute_typed<bfloat16>(rows, n, total_weight) : compute_typed<float>(rows, n, total_weight);
}
