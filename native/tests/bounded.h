// Numbers with a bound on what rounding may have made of them: what the engine is compared with.
//
// A wide number (double for float, long double for double) is carried through the same operations as the engine's, beside it how
// far the engine's number may be from it: a running error analysis (Higham, Accuracy and Stability of Numerical Algorithms, 3.3),
// with functions taken at the corners of their arguments' uncertainty. So the comparison needs no tolerance chosen by hand: a
// program that loses all digits is allowed to, one that loses none is not.
#pragma once
#include <cmath>
#include <limits>

#include "../opcodes.h"

namespace reference {

template <class R> struct Wide;
template <> struct Wide<float> { typedef double type; };
template <> struct Wide<double> { typedef long double type; };

// A decision that rounding may turn: nothing more can be said about this case.
struct Undecided {};

template <class R> struct Bounded {
    typedef typename Wide<R>::type W;
    static constexpr W U = W(std::numeric_limits<R>::epsilon()) / 2;
    static constexpr W TINY = W(std::numeric_limits<R>::min());
    static constexpr W LARGE = W(std::numeric_limits<R>::max()) / 16;
    static W inf() { return std::numeric_limits<W>::infinity(); }

    W v = 0, e = 0; // the value; how far the engine's may be, infinite where nothing is known
    Bounded() = default;
    Bounded(W value, W error = 0) : v(value), e(error) {
        // Something on the way may have overflowed, or vanished among denormal numbers.
        if (std::isfinite(v) && !(std::fabs(v) + e < LARGE)) e = inf();
        if (std::isnan(e)) e = inf();
    }
    static Bounded unknown() { return Bounded(0, inf()); }
    bool known() const { return e < inf(); }
    bool special() const { return !std::isfinite(v); }

    // Whether a number of the engine's is within the bounds.
    bool admits(R got) const {
        if (!known()) return true;
        if (std::isnan(v)) return std::isnan(got);
        if (std::isinf(v)) return W(got) == v;
        return std::fabs(W(got) - v) <= 2 * e + TINY * 4 * U;
    }
};

template <class R> Bounded<R> rounded(typename Wide<R>::type v, typename Wide<R>::type e, typename Wide<R>::type ulps = 1) {
    typedef Bounded<R> B;
    return B(v, e + ulps * 2 * B::U * (std::fabs(v) + e) + (ulps > 0 ? B::TINY * 2 * B::U : 0));
}
template <class R> Bounded<R> operator+(Bounded<R> a, Bounded<R> b) { return rounded<R>(a.v + b.v, a.e + b.e); }
template <class R> Bounded<R> operator-(Bounded<R> a, Bounded<R> b) { return rounded<R>(a.v - b.v, a.e + b.e); }
template <class R> Bounded<R> operator-(Bounded<R> a) { return Bounded<R>(-a.v, a.e); }
template <class R> Bounded<R> operator*(Bounded<R> a, Bounded<R> b) {
    if (!a.known() || !b.known()) return std::isnan(a.v) || std::isnan(b.v) ? rounded<R>(NAN, 0) : Bounded<R>::unknown();
    if (a.special() || b.special()) return Bounded<R>(a.v * b.v, a.e + b.e > 0 ? Bounded<R>::inf() : 0);
    return rounded<R>(a.v * b.v, std::fabs(a.v) * b.e + std::fabs(b.v) * a.e + a.e * b.e);
}

// A sum of many terms in any order: the bound grows with their number and with the sum of their sizes.
template <class R> class Sum {
  public:
    void add(Bounded<R> x) { total_ += x.v, size_ += std::fabs(x.v) + x.e, error_ += x.e, n_++; }
    Bounded<R> value() const {
        typedef Bounded<R> B;
        if (std::isfinite(total_) && !(size_ < B::LARGE)) return B::unknown();
        return B(total_, std::isfinite(total_) ? error_ + (n_ + 1) * 2 * B::U * size_ : error_);
    }

  private:
    typename Wide<R>::type total_ = 0, size_ = 0, error_ = 0;
    int n_ = 0;
};

// ---- functions

template <class W> W exactly(int op, W a, W b, W c) {
    const W one = 1;
    bool nan2 = std::isnan(a) || std::isnan(b);
    switch (op) {
    case COPY: return a;
    case ADD: return a + b;
    case SUB: return a - b;
    case MUL: return a * b;
    case DIV: return a / b;
    case MAX: return nan2 ? W(NAN) : a > b ? a : b;
    case MIN: return nan2 ? W(NAN) : a < b ? a : b;
    case POW: return std::pow(a, b);
    case ATAN2: return std::atan2(a, b);
    case FMA: return a * b + c;
    case FNMA: return c - a * b;
    case NEG: return -a;
    case ABS: return std::fabs(a);
    case SQRT: return std::sqrt(a);
    case RSQRT: return one / std::sqrt(a);
    case RECIPROCAL: return one / a;
    case EXP: return std::exp(a);
    case EXPM1: return std::expm1(a);
    case LOG: return std::log(a);
    case LOG1P: return std::log1p(a);
    case TANH: return std::tanh(a);
    case SIGMOID: return one / (one + std::exp(-a));
    case SOFTPLUS: return a > 0 ? a + std::log1p(std::exp(-a)) : std::log1p(std::exp(a));
    case SIN: return std::sin(a);
    case COS: return std::cos(a);
    case TAN: return std::tan(a);
    case ERF: return std::erf(a);
    case ATAN: return std::atan(a);
    case SINH: return std::sinh(a);
    case COSH: return std::cosh(a);
    case RELU: return a <= 0 ? W(0) : a;
    case SILU: return a / (one + std::exp(-a));
    case GELU: return a * std::erfc(-a / std::sqrt(W(2))) / 2;
    case SIGN: return std::isnan(a) ? a : a > 0 ? one : a < 0 ? -one : W(0);
    case FLOOR: return std::floor(a);
    case CEIL: return std::ceil(a);
    case TRUNC: return std::trunc(a);
    case ROUND: return std::nearbyint(a);
    case LOG2: return std::log2(a);
    case EXP2: return std::exp2(a);
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case EQ: return a == b;
    case NE: return a != b;
    case AND: return a != 0 && b != 0;
    case OR: return a != 0 || b != 0;
    case NOT: return a == 0;
    case WHERE: return a != 0 ? b : c;
    case DTANH: return a - a * b * b;
    case DSIGMOID: return a * b * (one - b);
    case DRELU: return b <= c ? W(0) : a;
    case MOD: {
        W r = std::fmod(a, b);
        return r != 0 && (r < 0) != (b < 0) ? r + b : r;
    }
    default: return W(NAN);
    }
}

// Units in the last place that an operation may be off by itself: the table of native/README.md, rounded up.
inline int ulps_of(int op) {
    switch (op) {
    case COPY: case MAX: case MIN: case NEG: case ABS: case RELU: case SIGN: case FLOOR: case CEIL: case TRUNC: case ROUND:
    case LT: case LE: case GT: case GE: case EQ: case NE: case AND: case OR: case NOT: case WHERE: case DRELU:
        return 0;
    case ADD: case SUB: case MUL: case DIV: case SQRT: case RECIPROCAL: case MOD:
        return 1;
    case GELU: case SILU:
        return 5;
    default:
        return 3;
    }
}

template <class R> Bounded<R> apply(int op, Bounded<R> a, Bounded<R> b, Bounded<R> c) {
    typedef Bounded<R> B;
    typedef typename B::W W;
    int arity = arity_of(op);
    B args[3] = {a, b, c};
    bool special = false, nan = false;
    for (int i = 0; i < arity; i++) {
        bool periodic = op == SIN || op == COS || op == TAN || op == MOD;
        if (!args[i].known() || args[i].e > W(0.01) * (periodic ? 1 : 1 + std::fabs(args[i].v))) return B::unknown();
        special = special || args[i].special(), nan = nan || std::isnan(args[i].v);
    }
    // A remainder turns with every multiple: where these are uncertain it may be anything.
    if (op == MOD && a.e + b.e > 0 && !(a.e + std::fabs(a.v / b.v) * b.e <= W(0.01) * std::fabs(b.v))) return B::unknown();
    W v = exactly<W>(op, a.v, b.v, c.v), e = 0;
    // Where a product of an infinity and zero depends on the order of the factors, any order is right.
    bool product = op == FMA || op == FNMA || op == DTANH || op == DSIGMOID || op == SILU || op == GELU || op == MOD || op == POW;
    if (product && special && !(nan && op != POW)) return B::unknown();
    // Tests for equality turn at single points, which may lie between the corners.
    if (op == AND || op == OR || op == NOT || op == WHERE)
        for (int i = 0; i < (op == WHERE ? 1 : arity); i++)
            if (args[i].e > 0 && std::fabs(args[i].v) <= args[i].e) return B::unknown();
    if ((op == EQ || op == NE) && a.e + b.e > 0 && std::fabs(a.v - b.v) <= a.e + b.e) return B::unknown();
    for (int corner = 0; corner < 1 << arity; corner++) {
        W x[3] = {};
        bool moved = false;
        for (int i = 0; i < arity; i++) x[i] = args[i].v + (corner >> i & 1 ? args[i].e : -args[i].e), moved = moved || args[i].e > 0;
        if (!moved) break;
        W there = exactly<W>(op, x[0], x[1], x[2]);
        if (std::isfinite(there) != std::isfinite(v)) return B::unknown();
        if (std::isfinite(v)) e = std::fmax(e, std::fabs(there - v));
    }
    if (e > W(0.02) * (1 + std::fabs(v))) return B::unknown(); // the corners say little of what lies between: a pole, a turn
    W scale = 0; // of what is added or cancelled inside
    if (op == FMA || op == FNMA) scale = std::fabs(a.v * b.v) + std::fabs(c.v);
    if (op == DTANH) scale = std::fabs(a.v) + std::fabs(a.v * b.v * b.v);
    if (op == DSIGMOID) scale = std::fabs(a.v * b.v) * (1 + std::fabs(b.v));
    if (op == GELU) scale = std::fmin(std::fabs(a.v), W(40)); // 1 + erf cancels, as PyTorch's does
    if (op == MOD) scale = std::fabs(b.v);
    if (!(std::fabs(scale) < B::LARGE)) return B::unknown();
    B made = rounded<R>(v, e, ulps_of(op));
    if (op == SILU) made.e += 8 * B::U * B::TINY * std::fabs(a.v); // the sigmoid may be denormal
    return B(made.v, made.e + 4 * B::U * scale);
}
template <class R> Bounded<R> apply(int op, Bounded<R> a) { return apply<R>(op, a, a, a); }
template <class R> Bounded<R> apply(int op, Bounded<R> a, Bounded<R> b) { return apply<R>(op, a, b, b); }

// a < b, where rounding cannot turn it.
template <class R> bool less(Bounded<R> a, Bounded<R> b) {
    auto room = 4 * (a.e + b.e);
    if (!(std::fabs(a.v - b.v) > room) && !(room == 0)) throw Undecided();
    return a.v < b.v;
}

} // namespace reference
