// Elementary functions of vectors of doubles. Branch-free: every lane computes every case and the right one is chosen.
// Maximum errors are measured by tests/native/test_math.py and listed in README.md.
//
// Coefficients: [fdlibm] Sun Microsystems' freely distributable C math library 5.3 (1993), files named at each use;
// [Cephes] S. L. Moshier, Methods and Programs for Mathematical Functions (1989), file named. Others are Taylor series.
#pragma once
#include <cmath>

#include "simd.h"

namespace NEURODE_NAMESPACE {

typedef Vec<double> D;
typedef Mask<double> M;

INLINE D d(double x) { return splat<double>(x); }
constexpr double INF = __builtin_inf();

// c[0] + c[1] x + ... by Horner's rule.
template <int N, class V, class R> INLINE V horner(const R (&c)[N], V x) {
    V sum = splat<R>(c[N - 1]);
    for (int i = N - 2; i >= 0; i--) sum = sum * x + splat<R>(c[i]);
    return sum;
}

// e / (e + 2) for e >= 0, which is tanh a for e = e^2a - 1. The sum is not rounded: the residual e - 2 q - e q of an estimate q
// corrects for that too. Without fused products it is exact enough for small e only; beyond, 1 - 2 / (e + 2) cancels nothing.
template <class R> INLINE Vec<R> over_plus_two(Vec<R> e) {
    Vec<R> sum = e + splat<R>(2), r = reciprocal_estimate<R>(sum), q = e * r;
    q = q + fused_minus<R>(q, e, fused_minus<R>(splat<R>(2), q, e)) * r;
#if NEURODE_VECTOR_BYTES == 16
    q = choose<R>(e < splat<R>(2), q, splat<R>(1) - splat<R>(2) * r);
#endif
    return q;
}

// For functions that no field of ours has hot: libm, lane by lane.
template <class F> INLINE D by_lane(D a, D b, F f) {
    D out;
    for (int i = 0; i < LANES<double>; i++) out[i] = f(a[i], b[i]);
    return out;
}

// ln 2 in two parts, the first with 21 zero bits at its end, so that its product with an exponent is exact [fdlibm e_exp.c].
constexpr double LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;
constexpr double LOG2_E = 1.44269504088896338700;

struct Reduced {
    D rest;     // x - n ln 2, in [-ln 2 / 2, ln 2 / 2]
    D low;      // what rounding cut off `rest`
    M exponent; // n
};

INLINE Reduced reduce_exp(D x) {
    D shifted = x * d(LOG2_E) + d(Float<double>::shifter), n = shifted - d(Float<double>::shifter);
    D high = x - n * d(LN2_HIGH), low = n * d(LN2_LOW), rest = high - low;
    return {rest, (high - rest) - low, bits<double>(shifted) - bits<double>(d(Float<double>::shifter))};
}

// (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2: Taylor series up to r^13, next term 4e-18.
constexpr double EXP_TAIL[] = {1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,      1.0 / 5040,
                              1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
INLINE D exp_tail(D r) { return horner(EXP_TAIL, r); }

// 2^n, n in [-1022, 1023].
INLINE D power_of_two(M n) { return from_bits<double>((n + Float<double>::bias) << Float<double>::mantissa); }

// x 2^n in two factors, for results among the denormals or near overflow; n in [-2044, 2046].
INLINE D scale(D x, M n) {
    M half = ((n + 4096) >> 1) - 2048;
    return x * power_of_two(half) * power_of_two(n - half);
}

INLINE D clamp(D x, double low, double high) { // NaN stays
    x = choose<double>(x < d(low), d(low), x);
    return choose<double>(x > d(high), d(high), x);
}

INLINE D vexp(D x) {
    Reduced r = reduce_exp(clamp(x, -750, 710)); // e^-750 rounds to 0, e^710 overflows
    D y = d(1) + (r.rest + (r.low + r.rest * r.rest * exp_tail(r.rest)));
    y = scale(y, r.exponent);
    return choose<double>(x == x, y, x);
}

INLINE D vexp2(D x) {
    D c = clamp(x, -1080, 1025), shifted = c + d(Float<double>::shifter), n = shifted - d(Float<double>::shifter);
    D f = c - n, r = f * d(0.693147180559945309417), low = f * d(2.319046813846299558e-17); // ln 2 and what it lacks
    D y = d(1) + (r + (low + r * r * exp_tail(r)));
    y = scale(y, bits<double>(shifted) - bits<double>(d(Float<double>::shifter)));
    return choose<double>(x == x, y, x);
}

// e^x - 1 for x in [-40, 709]: 2^n (e^r - 1) + (2^n - 1).
INLINE D expm1_inside(D x) {
    Reduced r = reduce_exp(x);
    D e = r.rest + (r.low + r.rest * r.rest * exp_tail(r.rest)), s = power_of_two(r.exponent);
    return e * s + (s - d(1));
}

INLINE D vexpm1(D x) {
    D inside = expm1_inside(clamp(x, -40, 700));
    D y = choose<double>(x > d(600), vexp(x), choose<double>(x < d(-40), d(-1), inside));
    y = choose<double>(magnitude<double>(x) < d(1e-300), x, y); // products of denormals would lose their bits
    return choose<double>(x == x, y, x);
}

// log(m 2^k): m in [sqrt(1/2), sqrt(2)), f = m - 1, c a correction to f [fdlibm e_log.c].
constexpr double LOG_ODD[] = {6.666666666666735130e-01, 2.857142874366239149e-01, 1.818357216161805012e-01,
                              1.479819860511658591e-01};
constexpr double LOG_EVEN[] = {3.999999999940941908e-01, 2.222219843214978396e-01, 1.531383769920937332e-01};
INLINE D log_of(D f, D k, D c) {
    D s = f / (d(2) + f), z = s * s, w = z * z;
    D r = z * horner(LOG_ODD, w) + w * horner(LOG_EVEN, w), half = d(0.5) * f * f;
    return k * d(LN2_HIGH) - ((half - (s * (half + r) + (k * d(LN2_LOW) + c))) - f);
}

struct Parts {
    D mantissa, exponent; // x = mantissa 2^exponent, mantissa in [sqrt(1/2), sqrt(2))
};

// The bits of the exponent (and of the sign): a logical shift, where AVX2 has no arithmetic one of 64 bits.
INLINE M exponent_bits(M i) {
    typedef uint64_t Unsigned __attribute__((vector_size(VECTOR_BYTES)));
    return (M)((Unsigned)i >> 52);
}

INLINE Parts split(D x) {
    M tiny = x < d(2.2250738585072014e-308);
    x = choose<double>(tiny, x * d(18014398509481984.0), x); // 2^54: denormals become normal
    // Adding 1 - sqrt(1/2), as bits, carries into the exponent from sqrt(2) on.
    M i = bits<double>(x) + (0x3ff0000000000000LL - 0x3fe6a09e667f3bcdLL);
    M k = exponent_bits(i) - 1023;
    M m = (i & 0x000fffffffffffffLL) + 0x3fe6a09e667f3bcdLL;
    D n = from_bits<double>(k + bits<double>(d(Float<double>::shifter))) - d(Float<double>::shifter);
    return {from_bits<double>(m), choose<double>(tiny, n - d(54), n)};
}

// x^p for x in [1e-300, inf] and |p| <= 1: what the control of steps needs, without the ends of `vpow`. K vectors go through every
// operation together, which hides the latency that one after the other would wait for.
template <int K> INLINE void powers(D (&x)[K], double p) {
    D f[K], n[K], s[K], z[K], w[K], odd[K], even[K];
    UNROLL for (int k = 0; k < K; k++) {
        M i = bits<double>(x[k]) + (0x3ff0000000000000LL - 0x3fe6a09e667f3bcdLL); // as in `split`
        n[k] = from_bits<double>(exponent_bits(i) + bits<double>(d(Float<double>::shifter))) - d(Float<double>::shifter + 1023);
        f[k] = from_bits<double>((i & 0x000fffffffffffffLL) + 0x3fe6a09e667f3bcdLL) - d(1);
    }
    UNROLL for (int k = 0; k < K; k++) s[k] = f[k] / (d(2) + f[k]);
    UNROLL for (int k = 0; k < K; k++) z[k] = s[k] * s[k], w[k] = z[k] * z[k];
    UNROLL for (int k = 0; k < K; k++) odd[k] = d(LOG_ODD[3]), even[k] = d(LOG_EVEN[2]);
    for (int j = 2; j >= 0; j--)
        UNROLL for (int k = 0; k < K; k++) odd[k] = odd[k] * w[k] + d(LOG_ODD[j]);
    for (int j = 1; j >= 0; j--)
        UNROLL for (int k = 0; k < K; k++) even[k] = even[k] * w[k] + d(LOG_EVEN[j]);
    UNROLL for (int k = 0; k < K; k++) // log of the mantissa: s (2 + z odd + w even)
        x[k] = s[k] * (odd[k] * z[k] + (even[k] * w[k] + d(2)));
    UNROLL for (int k = 0; k < K; k++) x[k] = d(p) * (n[k] * d(LN2_HIGH + LN2_LOW) + x[k]);
    UNROLL for (int k = 0; k < K; k++) x[k] = greater<double>(d(-700), lesser<double>(d(700), x[k]));
    UNROLL for (int k = 0; k < K; k++) s[k] = x[k] * d(LOG2_E) + d(Float<double>::shifter), n[k] = s[k] - d(Float<double>::shifter);
    UNROLL for (int k = 0; k < K; k++) x[k] = (x[k] - n[k] * d(LN2_HIGH)) - n[k] * d(LN2_LOW);
    UNROLL for (int k = 0; k < K; k++) z[k] = x[k] * x[k], odd[k] = d(EXP_TAIL[11]), even[k] = d(EXP_TAIL[10]);
    for (int j = 9; j >= 1; j -= 2)
        UNROLL for (int k = 0; k < K; k++) odd[k] = odd[k] * z[k] + d(EXP_TAIL[j]), even[k] = even[k] * z[k] + d(EXP_TAIL[j - 1]);
    UNROLL for (int k = 0; k < K; k++) x[k] = d(1) + (x[k] + z[k] * (odd[k] * x[k] + even[k]));
    UNROLL for (int k = 0; k < K; k++) // times 2^n, straight into the exponent
        x[k] = from_bits<double>(bits<double>(x[k]) + ((bits<double>(s[k]) - bits<double>(d(Float<double>::shifter))) << 52));
}

INLINE D log_ends(D x, D y) { // the values at the ends of the domain
    y = choose<double>(x == d(INF), x, y);
    y = choose<double>(x == d(0), d(-INF), y);
    y = choose<double>(x < d(0), d(__builtin_nan("")), y);
    return choose<double>(x == x, y, x);
}

INLINE D vlog(D x) {
    Parts p = split(x);
    return log_ends(x, log_of(p.mantissa - d(1), p.exponent, d(0)));
}

INLINE D vlog2(D x) {
    Parts p = split(x);
    D f = p.mantissa - d(1), y = log_of(f, d(0), d(0));
    // log2 m = log m / ln 2, the quotient's constant in two parts [fdlibm e_log2.c, ivln2]
    D z = y * d(1.44269504072144627571) + y * d(1.67517131648865118353e-10);
    return log_ends(x, p.exponent + z);
}

INLINE D vlog1p(D x) {
    D u = d(1) + x;
    Parts p = split(u);
    // What the sum 1 + x lost, seen from u [fdlibm s_log1p.c].
    D lost = choose<double>(x > d(1), d(1) - (u - x), x - (u - d(1))) / u;
    lost = choose<double>(u < d(1e300), lost, d(0));
    D y = log_of(p.mantissa - d(1), p.exponent, lost);
    y = choose<double>(p.exponent == d(0), log_of(x, d(0), d(0)), y);
    y = choose<double>(magnitude<double>(x) < d(1e-18), x, y);
    return log_ends(u, y);
}

// pi / 2 in three parts of 33 bits and the rest [fdlibm e_rem_pio2.c].
constexpr double PIO2_1 = 1.57079632673412561417, PIO2_2 = 6.07710050630396597660e-11, PIO2_3 = 2.02226624871116645580e-21,
                 PIO2_3_TAIL = 8.47842766036889956997e-32;
// Beyond this, n pi/2's first part is not exact: libm takes over, lane by lane.
constexpr double TRIG_LIMIT = 1.6e6;

struct Angle {
    D rest, low; // x - n pi / 2
    M quadrant;  // n
};

INLINE Angle reduce_angle(D x) {
    D shifted = x * d(6.36619772367581382433e-01) + d(Float<double>::shifter), n = shifted - d(Float<double>::shifter);
    D r = x - n * d(PIO2_1), w = n * d(PIO2_2), r2 = r - w, lost = (r - r2) - w;
    D w3 = n * d(PIO2_3), r3 = r2 - w3;
    lost = lost + ((r2 - r3) - w3) - n * d(PIO2_3_TAIL);
    D rest = r3 + lost;
    return {rest, (r3 - rest) + lost, bits<double>(shifted) - bits<double>(d(Float<double>::shifter))};
}

INLINE D sin_near(D x, D low) { // |x| <= pi/4 [fdlibm k_sin.c]
    static const double c[] = {8.33333333332248946124e-03, -1.98412698298579493134e-04, 2.75573137070700676789e-06,
                               -2.50507602534068634195e-08, 1.58969099521155010221e-10};
    D z = x * x, v = z * x;
    return x - ((z * (d(0.5) * low - v * horner(c, z)) - low) - v * d(-1.66666666666666324348e-01));
}

INLINE D cos_near(D x, D low) { // [fdlibm k_cos.c]
    static const double c[] = {4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
                               -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11};
    D z = x * x, half = d(0.5) * z, w = d(1) - half;
    return w + (((d(1) - w) - half) + (z * z * horner(c, z) - x * low));
}

INLINE D sine_of_quadrant(const Angle& a, int shift) {
    D s = sin_near(a.rest, a.low), c = cos_near(a.rest, a.low);
    M n = a.quadrant + shift;
    D y = choose<double>((n & 1) != 0, c, s);
    return from_bits<double>(bits<double>(y) ^ ((n & 2) << 62));
}

template <class F> INLINE D or_libm(D x, D y, F f) {
    M far = magnitude<double>(x) > d(TRIG_LIMIT);
    if (__builtin_expect(any<double>(far), 0)) y = choose<double>(far, by_lane(x, x, f), y);
    return choose<double>(x == x, y, x);
}

INLINE D vsin(D x) {
    D y = choose<double>(x == d(0), x, sine_of_quadrant(reduce_angle(x), 0));
    return or_libm(x, y, [](double a, double) { return std::sin(a); });
}
INLINE D vcos(D x) {
    return or_libm(x, sine_of_quadrant(reduce_angle(x), 1), [](double a, double) { return std::cos(a); });
}
INLINE D vtan(D x) {
    Angle a = reduce_angle(x);
    D y = sine_of_quadrant(a, 0) / sine_of_quadrant(a, 1);
    y = choose<double>(x == d(0), x, y);
    return or_libm(x, y, [](double v, double) { return std::tan(v); });
}

INLINE D vtanh(D x) {
    D a = magnitude<double>(x), e = expm1_inside(choose<double>(a > d(20), d(40), a + a)); // tanh 20 = 1 - 8e-18
    D y = with_sign<double>(over_plus_two<double>(e), sign_of<double>(x));
    y = choose<double>(a < d(1e-300), x, y);
    return choose<double>(x == x, y, x);
}

INLINE D vsinh(D x) {
    D a = magnitude<double>(x), e = expm1_inside(clamp(a, 0, 700)), small = d(0.5) * (e + e / (e + d(1)));
    D root = vexp(d(0.5) * a), y = choose<double>(a > d(700), d(0.5) * root * root, small);
    y = choose<double>(a < d(1e-300), a, y);
    y = with_sign<double>(y, sign_of<double>(x));
    return choose<double>(x == x, y, x);
}
INLINE D vcosh(D x) {
    D a = magnitude<double>(x), e = vexp(clamp(a, 0, 700)), root = vexp(d(0.5) * a);
    D y = choose<double>(a > d(700), d(0.5) * root * root, d(0.5) * (e + d(1) / e));
    return choose<double>(x == x, y, x);
}

INLINE D vsigmoid(D x) {
    D e = vexp(-magnitude<double>(x)), q = d(1) / (d(1) + e);
    return choose<double>(x >= d(0), q, e * q);
}
INLINE D vsoftplus(D x) {
    D tail = vlog1p(vexp(-magnitude<double>(x)));
    return choose<double>(x > d(0), x + tail, tail); // NaN: `tail` is NaN
}

INLINE D vatan(D x) { // [Cephes atan.c]
    static const double p[] = {-6.485021904942025371773e1, -1.228866684490136173410e2, -7.500855792314704667340e1,
                               -1.615753718733365076637e1, -8.750608600031904122785e-1};
    static const double q[] = {1.945506571482613964425e2, 4.853903996359136964868e2, 4.328810604912902668951e2,
                               1.650270098316988542046e2, 2.485846490142306297962e1, 1.0};
    D a = magnitude<double>(x);
    M steep = a > d(2.41421356237309504880), middle = a > d(0.66); // tan(3 pi / 8)
    D r = choose<double>(steep, d(-1) / a, choose<double>(middle, (a - d(1)) / (a + d(1)), a));
    D start = choose<double>(steep, d(1.57079632679489661923), choose<double>(middle, d(0.78539816339744830962), d(0)));
    D rest = choose<double>(steep, d(6.123233995736765886e-17), choose<double>(middle, d(3.061616997868382943e-17), d(0)));
    D z = r * r;
    D y = start + (r + (r * (z * horner(p, z) / horner(q, z)) + rest));
    y = choose<double>(a < d(1e-150), a, y);
    y = with_sign<double>(y, sign_of<double>(x));
    return choose<double>(x == x, y, x);
}

// erf [fdlibm s_erf.c]: four ranges of |x|, all computed. z is x with its low half cut, so that e^(-z^2) is exact enough.
INLINE D verf(D x) {
    static const double pp[] = {1.28379167095512558561e-01, -3.25042107247001499370e-01, -2.84817495755985104766e-02,
                                -5.77027029648944159157e-03, -2.37630166566501626084e-05};
    static const double qq[] = {1.0, 3.97917223959155352819e-01, 6.50222499887672944485e-02, 5.08130628187576562776e-03,
                                1.32494738004321644526e-04, -3.96022827877536812320e-06};
    static const double pa[] = {-2.36211856075265944077e-03, 4.14856118683748331666e-01, -3.72207876035701323847e-01,
                                3.18346619901161753674e-01, -1.10894694282396677476e-01, 3.54783043256182359371e-02,
                                -2.16637559486879084300e-03};
    static const double qa[] = {1.0, 1.06420880400844228286e-01, 5.40397917702171048937e-01, 7.18286544141962662868e-02,
                                1.26171219808761642112e-01, 1.36370839120290507362e-02, 1.19844998467991074170e-02};
    static const double ra[] = {-9.86494403484714822705e-03, -6.93858572707181764372e-01, -1.05586262253232909814e+01,
                                -6.23753324503260060396e+01, -1.62396669462573470355e+02, -1.84605092906711035994e+02,
                                -8.12874355063065934246e+01, -9.81432934416914548592e+00};
    static const double sa[] = {1.0, 1.96512716674392571292e+01, 1.37657754143519042600e+02, 4.34565877475229228821e+02,
                                6.45387271733267880336e+02, 4.29008140027567833386e+02, 1.08635005541779435134e+02,
                                6.57024977031928170135e+00, -6.04244152148580987438e-02};
    static const double rb[] = {-9.86494292470009928597e-03, -7.99283237680523006574e-01, -1.77579549177547519889e+01,
                                -1.60636384855821916062e+02, -6.37566443368389627722e+02, -1.02509513161107724954e+03,
                                -4.83519191608651397019e+02};
    static const double sb[] = {1.0, 3.03380607434824582924e+01, 3.25792512996573918826e+02, 1.53672958608443695994e+03,
                                3.19985821950859553908e+03, 2.55305040643316442583e+03, 4.74528541206955367215e+02,
                                -2.24409524465858183362e+01};
    constexpr double ERX = 8.45062911510467529297e-01;
    D a = magnitude<double>(x), c = choose<double>(a > d(6), d(6), a), z = c * c;
    D small = c + c * (horner(pp, z) / horner(qq, z));
    D s = c - d(1), middle = d(ERX) + horner(pa, s) / horner(qa, s);
    D t = d(1) / z;
    M far = c >= d(1 / 0.35);
    D ratio = choose<double>(far, horner(rb, t), horner(ra, t)) / choose<double>(far, horner(sb, t), horner(sa, t));
    D cut = from_bits<double>(bits<double>(c) & 0xffffffff00000000LL);
    D tail = vexp(-cut * cut - d(0.5625)) * vexp((cut - c) * (cut + c) + ratio) / c;
    D y = choose<double>(c < d(0.84375), small, choose<double>(c < d(1.25), middle, d(1) - tail));
    y = choose<double>(a < d(1e-160), a + a * d(1.28379167095512558561e-01), y);
    y = with_sign<double>(y, sign_of<double>(x));
    return choose<double>(x == x, y, x);
}

INLINE D vsqrt(D x) {
    D y;
    for (int i = 0; i < LANES<double>; i++) y[i] = __builtin_sqrt(x[i]);
    return y;
}

} // namespace NEURODE_NAMESPACE
