// Flattens a program row by row into straight lists, and simplifies them.
#include "straight.h"

#include <cstddef>
#include <iterator>
#include <map>
#include <tuple>
#include <utility>

namespace neurode {
namespace {

using std::size_t;

constexpr size_t MOST_LINES = 256;  // operations on rows: beyond, instructions over many rows waste little
constexpr int MOST_STATE = 64;      // features, and numbers of a sample's own data
constexpr int MOST_PRODUCT = 16;    // numbers of a matrix that becomes single products

class Flattener {
  public:
    Flattener(const Program& program, Straight& to) : p_(program), to_(to) {}

    bool run() {
        if (p_.size > MOST_STATE || p_.num_rowdata > MOST_STATE) return false;
        if (!section(p_.forward)) return false;
        for (int d = 0; d < p_.size; d++) to_.out.push_back(value(reference(p_.out.space, p_.out.row + d)));
        for (int32_t v : to_.out)
            if (v < 0) return false;
        to_.num_forward = int32_t(to_.values.size());
        return true;
    }

    // After `run`: the vector-Jacobian product and the gradients of parameters too.
    bool run_back() {
        if (!p_.grad_y.present()) return false;
        for (auto row = rows_.begin(); row != rows_.end();) // the way back has scratch rows of its own
            row = row->first >> SPACE_SHIFT == SCRATCH ? rows_.erase(row) : std::next(row);
        for (int d = 0; d < p_.size; d++) rows_[reference(COTANGENT, d)] = push(Straight::LEAF, COTANGENT, d, -1);
        if (!section(p_.backward)) return false;
        bool known = true;
        auto take = [&](std::vector<int32_t>& to, Place from, int n) {
            for (int i = 0; i < n; i++) {
                to.push_back(value(reference(from.space, from.row + i)));
                known = known && to.back() >= 0;
            }
        };
        take(to_.grad, p_.grad_y, p_.size);
        if (p_.grad_rowdata.present()) take(to_.grad_data, p_.grad_rowdata, p_.num_rowdata);
        return known && gradient();
    }

  private:
    static int32_t reference(int space, int row) { return space << SPACE_SHIFT | row; }

    // The value that a row holds now; -1 where nothing has written it.
    int32_t value(int32_t ref) {
        auto known = rows_.find(ref);
        if (known != rows_.end()) return known->second;
        int space = ref >> SPACE_SHIFT, row = ref & ROW_MASK;
        bool given = space == UNIFORM || space == ROWDATA || (space == SAVED && row <= p_.size);
        return given ? rows_[ref] = push(Straight::LEAF, space, row, -1) : -1;
    }
    void write(Place at, int i, int32_t v) { rows_[reference(at.space, at.row + i)] = v; }

    int32_t push(int32_t op, int32_t a, int32_t b, int32_t c) {
        auto [at, fresh] = known_.try_emplace(std::make_tuple(op, a, b, c), int32_t(to_.values.size()));
        if (fresh) to_.values.push_back({op, a, b, c});
        return at->second;
    }
    bool negative(int32_t v) const { return to_.is(v, NEG); }
    int32_t inside(int32_t v) const { return to_.values[v].a; }

    // The value of an operation. What is rewritten here gives the same bits.
    int32_t emit(int32_t op, int32_t a, int32_t b = -1, int32_t c = -1) {
        if (op == COPY) return a;
        if (op == NEG && negative(a)) return inside(a);
        if ((op == MUL || op == DIV) && negative(a)) return emit(NEG, emit(op, inside(a), b));
        if ((op == MUL || op == DIV) && negative(b)) return emit(NEG, emit(op, a, inside(b)));
        if (op == ADD && negative(b)) return emit(SUB, a, inside(b));
        if (op == ADD && negative(a)) return emit(SUB, b, inside(a));
        if (op == SUB && negative(b)) return emit(ADD, a, inside(b));
        if ((op == ADD || op == MUL) && a > b) std::swap(a, b);
        return push(op, a, b, c);
    }

    bool section(const Section& section) {
        for (const Instruction& i : section) {
            bool known = false;
            switch (i.opcode) {
            case POINTWISE: known = pointwise(i); break;
            case REDUCE: known = reduce(i); break;
            case SAMPLE_PRODUCT: known = sample_product(i); break;
            case GEMM: known = product(i); break;
            default: break;
            }
            if (!known || to_.values.size() > 2 * MOST_LINES) return false;
        }
        return true;
    }

    bool pointwise(const Instruction& i) {
        if (int64_t(i.n) * i.num_steps > int64_t(2 * MOST_LINES)) return false;
        for (int row = 0; row < i.n; row++) {
            std::vector<int32_t> registers;
            for (int k = 0; k < i.num_inputs; k++) {
                registers.push_back(value(i.inputs[k].ref(row)));
                if (registers.back() < 0) return false;
            }
            auto operand = [&](const Chain& s, int k, int r) { return k < arity_of(s.micro) ? registers[r] : -1; };
            for (int s = 0; s < i.num_steps; s++) {
                const Chain& step = i.steps[s];
                registers.push_back(emit(step.micro, operand(step, 0, step.a), operand(step, 1, step.b), operand(step, 2, step.c)));
            }
            for (int k = 0; k < i.num_outputs; k++) write(i.outputs[k].at, row, registers[i.outputs[k].reg]);
        }
        return true;
    }

    bool reduce(const Instruction& i) {
        static const int ops[] = {ADD, MAX, MIN, MUL};
        if (i.kind < 0 || i.kind > 3 || i.m < 1 || int64_t(i.n) * i.m > int64_t(MOST_LINES)) return false;
        for (int k = 0; k < i.n; k++) {
            int32_t sum = value(i.x.ref(k * i.m));
            for (int j = 1; j < i.m && sum >= 0; j++) {
                int32_t next = value(i.x.ref(k * i.m + j));
                sum = next < 0 ? -1 : emit(ops[i.kind], sum, next);
            }
            if (sum < 0) return false;
            write(i.out, k, sum);
        }
        return true;
    }

    // sum_k x_k z_k, from `sum` on (-1: nothing).
    template <class X, class Z> int32_t dot(int n, X x, Z z, int32_t sum) {
        for (int k = 0; k < n; k++) {
            int32_t a = x(k), b = z(k);
            if (a < 0 || b < 0) return -1;
            sum = sum < 0 ? emit(MUL, a, b) : emit(FMA, a, b, sum);
        }
        return sum;
    }

    bool sample_product(const Instruction& i) {
        if (int64_t(i.count) * i.O * i.K * i.J > int64_t(MOST_LINES) || i.K < 1) return false;
        for (int b = 0; b < i.count; b++)
            for (int r = 0; r < i.O; r++)
                for (int j = 0; j < i.J; j++) {
                    auto x = [&](int k) { return value(i.x.ref((b * i.O + r) * i.K + k)); };
                    auto z = [&](int k) { return value(i.z.ref((b * i.K + k) * i.J + j)); };
                    int32_t sum = dot(i.K, x, z, -1);
                    if (sum < 0) return false;
                    write(i.out, (b * i.O + r) * i.J + j, sum);
                }
        return true;
    }

    bool product(const Instruction& i) {
        if (int64_t(i.O) * i.K > MOST_PRODUCT || int64_t(i.count) * i.O * i.K > int64_t(MOST_LINES) || i.K < 1) return false;
        for (int c = 0; c < i.count; c++)
            for (int o = 0; o < i.O; o++) {
                auto x = [&](int k) { return value(i.x.ref(c * i.K + k)); };
                auto w = [&](int k) { return value(reference(UNIFORM, i.weight + o * i.weight_o + k * i.weight_k)); };
                int32_t sum = i.bias < 0 ? -1 : value(reference(UNIFORM, i.bias + o * i.bias_o));
                sum = dot(i.K, x, w, sum);
                if (sum >= 0 && !i.add.absent()) {
                    int32_t more = value(i.add.ref(c * i.O + o));
                    sum = more < 0 ? -1 : emit(ADD, sum, more);
                }
                int32_t aux = i.aux.absent() ? -1 : value(i.aux.ref(c * i.O + o));
                if (sum < 0 || (arity_of(i.act) == 2 && aux < 0) || arity_of(i.act) > 2) return false;
                write(i.out, c * i.O + o, emit(i.act, sum, arity_of(i.act) == 2 ? aux : -1));
            }
        return true;
    }

    bool gradient() {
        for (const Instruction& i : p_.gradient)
            if (!(i.opcode == WGRAD ? weight_gradient(i) : row_gradient(i)) || to_.terms.size() > MOST_LINES) return false;
        return true;
    }
    bool weight_gradient(const Instruction& i) {
        if (int64_t(i.O) * i.K > MOST_PRODUCT || int64_t(i.count) * i.O * i.K > int64_t(MOST_LINES)) return false;
        for (int c = 0; c < i.count; c++)
            for (int o = 0; o < i.O; o++)
                for (int k = 0; k < i.K; k++) {
                    int32_t g = value(i.x.ref(c * i.O + o)), x = value(i.z.ref(c * i.K + k));
                    if (!term(i.acc + o * i.acc_o + k * i.acc_k, g, x) || x < 0) return false;
                }
        return true;
    }
    bool row_gradient(const Instruction& i) {
        if (int64_t(i.n) * i.m > int64_t(MOST_LINES)) return false;
        for (int k = 0; k < i.n * i.m; k++)
            if (!term(i.acc + k / i.m, value(i.x.ref(k)), -1)) return false;
        return true;
    }
    bool term(int32_t accumulator, int32_t a, int32_t b) {
        auto [at, fresh] = sums_.try_emplace(accumulator, int32_t(to_.accumulators.size()));
        if (fresh) to_.accumulators.push_back(accumulator);
        to_.terms.push_back({at->second, a, b});
        return a >= 0;
    }

    const Program& p_;
    Straight& to_;
    std::map<int32_t, int32_t> rows_, sums_;
    std::map<std::tuple<int32_t, int32_t, int32_t, int32_t>, int32_t> known_;
};

// How often a value is read on the way to what is wanted.
std::vector<int> count_uses(const Straight& s) {
    std::vector<int> uses(s.values.size());
    for (const std::vector<int32_t>* wanted : {&s.out, &s.grad, &s.grad_data})
        for (int32_t v : *wanted) uses[v]++;
    for (const Straight::Term& t : s.terms) {
        uses[t.a]++;
        if (t.b >= 0) uses[t.b]++;
    }
    for (size_t i = s.values.size(); i-- > 0;) { // what nobody reads reads nothing
        const Straight::Value& v = s.values[i];
        if (v.op == Straight::LEAF || !uses[i]) continue;
        const int32_t operands[3] = {v.a, v.b, v.c};
        for (int k = 0; k < Straight::arity(v.op); k++) uses[operands[k]]++;
    }
    return uses;
}

// A product that only a sum reads is computed with it, rounded once where the processor can.
void join_products(Straight& s) {
    std::vector<int> uses = count_uses(s);
    auto joins = [&](int32_t v) { return s.is(v, MUL) && uses[v] == 1; };
    for (size_t i = 0; i < s.values.size(); i++) {
        Straight::Value& v = s.values[i];
        if (!uses[i] || (v.op != ADD && v.op != SUB)) continue;
        bool first = joins(v.a), second = joins(v.b);
        if (!first && !second) continue;
        const Straight::Value product = s.values[second ? v.b : v.a];
        int32_t rest = second ? v.a : v.b;
        v = {v.op == ADD ? int32_t(FMA) : second ? int32_t(FNMA) : int32_t(FMS), product.a, product.b, rest};
    }
}

// Gives values rows: the lists of lines that compute what is wanted.
class Lister {
  public:
    explicit Lister(Straight& s) : s_(s), rows_(s.values.size()), left_(count_uses(s)), wanted_(s.values.size()) {
        for (size_t v = 0; v < rows_.size(); v++) {
            wanted_[v] = left_[v] && s.values[v].op != Straight::LEAF;
            if (s.values[v].op == Straight::LEAF) rows_[v] = leaf(s.values[v]);
        }
    }

    void forward() {
        std::vector<size_t> copies = place(s_.out, LineRow::OUT);
        keep();
        list(0, s_.num_forward, s_.forward);
        for (size_t d : copies) s_.forward.push_back(copy(LineRow::OUT, d, s_.out[d]));
    }
    void backward() {
        std::vector<size_t> copies = place(s_.grad, LineRow::GRAD);
        list(s_.num_forward, int32_t(rows_.size()), s_.backward);
        for (size_t d : copies) s_.backward.push_back(copy(LineRow::GRAD, d, s_.grad[d]));
        for (size_t i = 0; i < s_.grad_data.size(); i++) {
            LineRow sum = {LineRow::GRAD_DATA, int32_t(i)};
            s_.backward.push_back({ADD, sum, {rows_[s_.grad_data[i]], sum, {}}});
        }
        for (const Straight::Term& t : s_.terms) {
            LineRow sum = {LineRow::SUM, t.sum};
            if (t.b < 0) s_.backward.push_back({ADD, sum, {rows_[t.a], sum, {}}});
            else s_.backward.push_back({FMA, sum, {rows_[t.a], rows_[t.b], sum}});
        }
    }

  private:
    // Results go straight to where they are wanted; those that have a row already are copied, and their places returned.
    std::vector<size_t> place(const std::vector<int32_t>& values, LineRow::Kind kind) {
        std::vector<size_t> copies;
        for (size_t d = 0; d < values.size(); d++) {
            LineRow& row = rows_[values[d]];
            if (row.kind != LineRow::NONE) copies.push_back(d);
            else row = {kind, int32_t(d)};
        }
        return copies;
    }
    Line copy(LineRow::Kind kind, size_t d, int32_t v) const { return {COPY, {kind, int32_t(d)}, {rows_[v], {}, {}}}; }

    // Rows of their own for values of f that the way back reads.
    void keep() {
        auto need = [&](int32_t v) {
            if (v >= 0 && v < s_.num_forward && rows_[v].kind == LineRow::NONE) rows_[v] = {LineRow::KEPT, s_.num_kept++};
        };
        for (size_t i = s_.num_forward; i < rows_.size(); i++) {
            const Straight::Value& v = s_.values[i];
            const int32_t operands[3] = {v.a, v.b, v.c};
            for (int k = 0; wanted_[i] && k < Straight::arity(v.op); k++) need(operands[k]);
        }
        for (const std::vector<int32_t>* read : {&s_.grad, &s_.grad_data})
            for (int32_t v : *read) need(v);
        for (const Straight::Term& t : s_.terms) need(t.a), need(t.b);
    }
    void list(int32_t first, int32_t end, std::vector<Line>& to) {
        for (int32_t v = first; v < end; v++)
            if (wanted_[v]) to.push_back(line(v));
    }
    LineRow leaf(const Straight::Value& v) {
        if (v.a == UNIFORM) return s_.num_uniform++, LineRow{LineRow::NUMBER, v.b};
        if (v.a == ROWDATA) return {LineRow::DATA, v.b};
        if (v.a == COTANGENT) return {LineRow::COTANGENT, v.b};
        if (v.b > 0) return {LineRow::STATE, v.b - 1};
        return s_.reads_time = true, LineRow{LineRow::TIME, 0};
    }
    Line line(int32_t v) {
        const Straight::Value& value = s_.values[v];
        const int32_t operands[3] = {value.a, value.b, value.c};
        Line made = {value.op, {}, {}};
        for (int k = 0; k < Straight::arity(value.op); k++) {
            int32_t x = operands[k];
            made.operands[k] = rows_[x];
            if (--left_[x] == 0 && rows_[x].kind == LineRow::SPARE) free_.push_back(rows_[x].index);
        }
        if (rows_[v].kind == LineRow::NONE) rows_[v] = {LineRow::SPARE, spare()};
        made.out = rows_[v];
        return made;
    }
    int32_t spare() {
        if (free_.empty()) return s_.num_spare++;
        int32_t row = free_.back();
        free_.pop_back();
        return row;
    }

    Straight& s_;
    std::vector<LineRow> rows_;
    std::vector<int> left_; // reads to come
    std::vector<bool> wanted_;
    std::vector<int32_t> free_;
};

} // namespace

bool straighten(const Program& program, Straight& to) {
    if (!Flattener(program, to).run()) return false;
    join_products(to);
    Lister(to).forward();
    return to.forward.size() <= MOST_LINES;
}

bool straighten_back(const Program& program, Straight& to) {
    Flattener flattener(program, to);
    if (!flattener.run() || !flattener.run_back()) return false;
    join_products(to);
    Lister lister(to);
    lister.forward();
    lister.backward();
    return to.forward.size() + to.backward.size() <= 2 * MOST_LINES;
}

} // namespace neurode
